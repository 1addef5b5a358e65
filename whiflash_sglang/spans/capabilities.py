"""A server's capabilities, which clients read before they send hints."""

from collections.abc import Iterable

from whiflash_sdk.hints import MAX_BYTES, MAX_MARKER_CHARS, MAX_NAME_CHARS, MAX_SPANS, WIRE_VERSION

from whiflash_sglang.spans.hints import KINDS


def capabilities(
    *,
    server_version: str,
    model: str,
    policy: str,
    arms: Iterable[str],
    routes: Iterable[str],
    prediction_tokens: int,
    tool_call_parser: str | None,
    reasoning_parser: str | None,
) -> dict[str, object]:
    """The body of `GET /whiflash/capabilities`, by which a client learns that hints are understood."""
    return {
        "version": WIRE_VERSION,
        "server_version": server_version,
        "model": model,
        "policy": policy,
        "arms": list(arms),
        "kinds": list(KINDS),
        "routes": list(routes),
        "prediction_tokens": prediction_tokens,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
        "limits": {
            "spans": MAX_SPANS,
            "marker_chars": MAX_MARKER_CHARS,
            "name_chars": MAX_NAME_CHARS,
            "bytes": MAX_BYTES,
        },
    }
