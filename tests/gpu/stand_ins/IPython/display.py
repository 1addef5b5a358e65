"""As of `IPython`."""

HTML = display = print
