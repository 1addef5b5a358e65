# ruff: noqa: N999
"""SGLang imports `IPython.display` when it is imported itself, and shows nothing while it serves."""
