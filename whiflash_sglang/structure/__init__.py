"""Finds forced and likely text, from grammars, schemas and tools."""
