"""Drafters, trained on answers of their target."""

__version__ = "0.1.0"
