"""Copies text from a request's own context. Pure Python: imports neither SGLang nor torch."""
