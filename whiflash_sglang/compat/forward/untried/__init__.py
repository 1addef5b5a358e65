"""Verifications that no card has run and that no default leads to: recurrent layers on CUDA.

The rest of `compat/forward` can be read without them. Each is imported where a server asks for it.
"""
