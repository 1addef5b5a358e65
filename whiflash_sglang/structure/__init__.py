"""Forced and likely text, from grammars and schemas."""
