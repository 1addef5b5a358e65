"""The tile of attention that a request's rows take, for kernels and for who prices them."""

NARROW = 16
"""Rows times query heads of a KV head, of one request, up to which Triton's kernel takes its smaller tile."""
