"""The limit between attention's two tile sizes, for the kernels and for the prices of verifications."""

NARROW = 16
"""Largest product of a request's rows and query heads per KV head for which Triton's kernel takes its smaller tile."""
