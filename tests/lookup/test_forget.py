"""Bodies of the forget route, which reach the scheduler as SGLang's message carries them."""

import pytest

from whiflash_sglang.copying.tenants import handle_of, parse_forget, tenant_of
from whiflash_sglang.engine.scheduler.control import EVERYBODY, FORGET, encode_forget
from whiflash_sglang.errors import ConfigError


def handle(extra_key: str | None, cache_salt: str | None) -> int:
    tenant = tenant_of(extra_key, cache_salt)
    assert tenant is not None
    return handle_of(tenant)


def test_no_key_no_tenant() -> None:
    assert tenant_of(None, None) is None
    assert tenant_of("", "") is None


def test_the_two_keys_do_not_run_into_each_other() -> None:
    keys = [("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc"), ("1:a", ""), ("a", "")]
    assert len({tenant_of(*pair) for pair in keys}) == len(keys)


def test_one_tenant_is_named_as_its_requests_named_it() -> None:
    assert parse_forget({"cache_salt": "s"}) == handle(None, "s")
    assert parse_forget({"cache_salt": "s", "extra_key": "k"}) == handle("k", "s")
    assert parse_forget({"extra_key": "k", "cache_salt": None, "all": False}) == handle("k", None)


def test_everybody_has_to_be_asked_for() -> None:
    assert parse_forget({"all": True}) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give cache_salt"),
        ({"cache_salt": ""}, "give cache_salt"),
        ({"all": True, "cache_salt": "s"}, "only all: true"),
        ({"all": 1}, "'all' must be true or false"),
        ({"cache_salt": 7}, "'cache_salt' must be a string"),
        ({"all": True, "agent": None}, "'agent' is unknown"),
        ({"salt": "s"}, "'salt' is unknown; known: all, cache_salt, extra_key"),
    ],
)
def test_anything_else_is_refused(body: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_forget(body)


def test_the_message_holds_numbers_only() -> None:
    assert encode_forget(handle(None, "s")) == {FORGET: handle(None, "s")}
    assert encode_forget(None) == {FORGET: EVERYBODY}
    assert (handle_of(b"\0" * 32), handle_of(b"\xff" * 32)) == (0, 2**63 - 1)
