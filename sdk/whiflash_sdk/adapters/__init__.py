"""Adapters for agent frameworks: each module has a `wrap_model` that gives a framework's model a wrapped client.

Everything else works as on the plain client: `whiflash_sdk.spans` blocks around a run or a step, and
`whiflash_sdk.collect()` for traces that a framework does not return. Each module needs the extra of
its name; this package imports none of them.
"""
