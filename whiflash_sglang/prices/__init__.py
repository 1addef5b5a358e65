"""Prices of passes, measured."""
