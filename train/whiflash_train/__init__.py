"""Train drafters on their target's answers, and put them together in bundles."""

__version__ = "0.1.0"
