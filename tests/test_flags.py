"""The help of WHIFLASH's flags is what the code takes. The documentation: `tests/docs/`."""

import re
from typing import get_args

import pytest
from in_process import whiflash

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.settings.config import Flags, RouterName, flag_of, parse_flags
from whiflash_sglang.settings.flags import flags


def test_every_flag_is_there_with_its_choices() -> None:
    shown = dict(zip(Flags.model_fields, flags(), strict=True))
    assert [name for name, *_ in shown.values()] == list(map(flag_of, shown))
    assert all(info.description for info in Flags.model_fields.values())
    assert shown["router"][1].split("|") == list(get_args(RouterName))
    assert shown["eagle_steps"][1] == "INTEGER"
    assert shown["eagle_draft"][1] == "PATH"
    for field, (name, takes, _) in shown.items():
        for choice in takes.split("|") if "|" in takes else ():
            parse_flags({field: choice})
        if "|" in takes:
            with pytest.raises(ConfigError, match=name):
                parse_flags({field: "something else"})


def test_help_shows_them_with_their_choices() -> None:
    said = whiflash("serve", "--help").stdout
    for field in Flags.model_fields:
        assert flag_of(field) in said
    assert set(re.findall(r"[\w-]+", said)) >= set(get_args(RouterName))
    assert len(Flags.model_fields) <= 24
