"""One function a framework: `wrap_model` gives the model object that its agents use the wrapped client.

Everything else works as on the plain client: `whiflash_sdk.spans` blocks around a run or a step, and
`whiflash_sdk.collect()` for the traces that a framework keeps to itself. Each module needs the extra of
its name, and nothing is imported until it is.
"""
