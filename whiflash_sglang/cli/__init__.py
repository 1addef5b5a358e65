"""The `whiflash` command (`app.py`).

Modules of this package import what they need when they are called: help and errors come without torch and SGLang.
"""

SERVE, LOOK, DECIDE, TRAIN, MORE = "Serve", "Look", "Decide", "Train", "More"
"""Groups of commands in the help."""
