"""Redact a server's keys in SGLang's log of arguments and in `GET /server_info`, which show them.

The route is open to every holder of the API key, and to everybody if there is only an admin key. Both could read the
admin key there, which opens the steering routes.
"""

from typing import Any

from whiflash_sglang.engine.carried import asks_for_ours
from whiflash_sglang.engine.patching import around

CUT_OUT = "<redacted>"


@around(
    "sglang.srt.entrypoints.engine:_server_args_for_logging",
    params=("server_args",),
    why="SGLang writes a server's keys to its log",
    until="SGLang redacts them",
)
def _logged(original: Any, server_args: Any) -> Any:
    """Redact keys in the log of arguments."""
    return without_keys(original(server_args), server_args)


def without_keys(value: Any, server_args: Any) -> Any:
    """Return `value` with the server's keys cut out of all its strings, which include the command line. On servers
    without WHIFLASH it stays as it is.
    """
    if not asks_for_ours(server_args):
        return value
    keys = [key for key in (server_args.api_key, server_args.admin_api_key) if key]
    return _cut(value, sorted(keys, key=len, reverse=True)) if keys else value


def _cut(value: Any, keys: list[str]) -> Any:
    if isinstance(value, str):
        for key in keys:
            value = value.replace(key, CUT_OUT)
        return value
    if isinstance(value, dict):
        return {name: _cut(inner, keys) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(inner, keys) for inner in value]
    return value
