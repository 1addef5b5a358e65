"""What the forget route takes, and that it reaches the scheduler as SGLang's message carries it."""

import pytest

from whiflash_sglang.compat.control import EVERYBODY, FORGET, encode_forget
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.forget import parse_forget
from whiflash_sglang.lookup.memory import handle_of, tenant_of


def test_one_tenant_is_named_as_its_requests_named_it() -> None:
    assert parse_forget({"cache_salt": "s"}) == tenant_of(None, "s")
    assert parse_forget({"cache_salt": "s", "extra_key": "k"}) == tenant_of("k", "s")
    assert parse_forget({"extra_key": "k", "cache_salt": None, "all": False}) == tenant_of("k", None)


def test_everybody_has_to_be_asked_for() -> None:
    assert parse_forget({"all": True}) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give cache_salt"),
        ({"cache_salt": ""}, "give cache_salt"),
        ({"all": True, "cache_salt": "s"}, "all: true alone"),
        ({"all": 1}, "'all' must be true or false"),
        ({"cache_salt": 7}, "'cache_salt' must be a string"),
        ({"salt": "s"}, "'salt' is unknown; known: all, cache_salt, extra_key"),
    ],
)
def test_anything_else_is_refused(body: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_forget(body)


def test_the_message_holds_numbers_only() -> None:
    tenant = tenant_of(None, "s")
    assert tenant is not None
    assert encode_forget(tenant) == {FORGET: handle_of(tenant)}
    assert encode_forget(None) == {FORGET: EVERYBODY}
    assert 0 <= handle_of(tenant) < 2**63
