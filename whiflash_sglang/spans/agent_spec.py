"""AgentSpec's fields of a request's body (arXiv 2608.24004): `agent-id`, `query-id` and `structure`, which its clients
send through `extra_body`. They become the hints `agent`, `query` and `structure`.

Published are the three names, and that a structure is a list of begin and end markers; how these are spelt in JSON is
not, so the spelling here is that of the hint: a list of pairs.
"""

from collections.abc import Mapping
from typing import Any, Final

from whiflash_sglang.spans.carrier import add_hints, validate_custom_params
from whiflash_sglang.spans.fields import HintError
from whiflash_sglang.spans.hints import MAX_BYTES, SCOPES, WIRE_KEY, read_scope

FIELDS: Final = ("agent-id", "query-id", "structure")


def add_body_scope(custom_params: dict[str, Any] | None, body: object) -> dict[str, Any] | None:
    """`custom_params` of a request, whose hints say what its `body` says in AgentSpec's fields.

    A body without `agent-id` says nothing: `structure` alone may be anything.

    Raises: HintError, and nothing else, naming the field that is wrong.
    """
    if not isinstance(body, Mapping) or body.get(FIELDS[0]) is None:
        return custom_params
    scope = read_scope("", dict(body), FIELDS)
    own = validate_custom_params(custom_params)
    for field, name in zip(FIELDS, SCOPES, strict=True):
        if getattr(own, name):
            raise HintError(field, f"stands beside custom_params.{WIRE_KEY}.{name}; give one of them")
    said = {name: value for name in SCOPES if (value := getattr(scope, name))}
    params = add_hints(custom_params, said)
    if params is None:
        raise HintError(FIELDS[0], f"and what goes with it makes the hints longer than {MAX_BYTES} bytes")
    return params
