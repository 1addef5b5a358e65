"""Flags, and what they mean to a server."""
