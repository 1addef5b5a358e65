"""Adapters for agent frameworks: each module has a `wrap_model` that gives a framework's model a wrapped client.

Everything else works as on the plain client: `whiflash_sdk.spans` blocks around a run or a step, and
`whiflash_sdk.collect()` for traces that a framework does not return. Each module needs the extra of
its name; this package imports none of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from whiflash_sdk import __version__


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Let errors of imports in this block say how to install the missing package: by the extra `name` of this SDK."""
    try:
        yield
    except ModuleNotFoundError as error:
        wheel = f"pip install 'dist/whiflash_sdk-{__version__}-py3-none-any.whl[{name}]'"
        said = (
            f"{error.name} is not installed, which this adapter needs: install whiflash-sdk[{name}], from files {wheel}"
        )
        raise ModuleNotFoundError(said, name=error.name) from None
