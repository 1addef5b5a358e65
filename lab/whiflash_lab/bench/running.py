"""`whiflash bench --url`: measures servers that run already, with WHIFLASH or without. Imports no torch and no SGLang.

Any server of OpenAI's chat completions is asked; SGLang says more, such as the tokens a round. Answers are compared by
their text, since a server gives no logits.
"""

import asyncio
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any
from uuid import uuid4

import httpx
from pydantic import Field

from whiflash_lab.bench.arms import NONE, Arm
from whiflash_lab.bench.cells import Answer as Timed
from whiflash_lab.bench.load import ROUNDS, Asker
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Difference, Reference, differences
from whiflash_lab.bench.runner import TOLD, Runner
from whiflash_sglang.errors import UsageError, WhiflashError
from whiflash_sglang.files import provenance
from whiflash_sglang.files.hosts import Answer, ask, without_password

SALTED = ("sglang", "vllm")
"""Owners of models that know `cache_salt`, without which a request would find an earlier one's prefix, and ignore
fields that they do not know."""
_NAME = frozenset(f"{string.ascii_letters}{string.digits}._:-")


class Models(Answer):
    """Answer of `GET /v1/models`."""

    data: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)]


def arms_of(given: Sequence[str]) -> list[Arm]:
    """Return the arms of `NAME=URL`, whose arguments are the URL. A URL without a name is named by its host.

    Raises:
        UsageError: one is no URL, or a name is that of plain decoding which `bench` starts, or is given twice.
    """
    arms: dict[str, Arm] = {}
    for each in given:
        name, _, url = each.partition("=") if "=" in each.partition("://")[0] else ("", "", each)
        shown = without_password(url)
        name = name or shown.partition("://")[2]
        try:
            valid = httpx.URL(url).host and url.startswith(("http://", "https://")) and _NAME.issuperset(name)
        except httpx.InvalidURL:  # its text may hold a password
            valid = False
        taken = name in (NONE, *arms)
        if not valid or taken:
            why = "this name is taken, give another" if taken else "give NAME=URL, such as plain=http://127.0.0.1:30000"
            raise UsageError(f"--url {name}={shown}: {why}")
        arms[name] = Arm(name, name, (url.rstrip("/").removesuffix("/v1"),))
    return list(arms.values())


class Visitor(Runner):
    """Runs a benchmark on servers that run already. The first one's answers are the references."""

    def _start(self, arms: Sequence[Arm]) -> None:
        """Ask each server for its model.

        Raises:
            WhiflashError: one does not answer, or serves another model than the first.
        """
        self._at_once = max(load.value for load in self._plan.loads)
        self._fleet.start({arm.server: arm.arguments for arm in arms})
        wanted: set[str] = set()
        for arm in arms:
            client, url = self._fleet.clients[arm.server], arm.arguments[0]
            models = ask(client, url, "/v1/models", Models)["data"]
            model = next((one for one in models if not wanted or wanted & _names(one)), None)
            if model is None:
                served = ", ".join(str(one.get("id")) for one in models)
                raise WhiflashError(
                    f"{arm.name} serves {served}, and {arms[0].name} {self._servers[arms[0].name]['model']}: figures "
                    "of different models do not compare. If they are the same, start one server with the other's "
                    "--served-model-name"
                )
            wanted = wanted or _names(model)
            told: dict[str, Any] = {}
            with suppress(WhiflashError):  # it is no SGLang, or its key does not open this route
                told = ask(client, url, "/server_info", Answer)
            self._servers[arm.name] = {
                "url": without_password(url),
                "model": model.get("id"),
                "server": model.get("owned_by"),
                "salted": model.get("owned_by") in SALTED,
                **{key: told[key] for key in ("version", "speculative_algorithm", *TOLD) if key in told},
            }

    def _renew(self) -> None:
        """Go on with the same servers."""

    def _prepare(self, arm: Arm, client: httpx.Client) -> None:
        """Leave the prefix cache as it is, which others may use; requests have a salt."""

    def _asker(self, client: httpx.AsyncClient, arm: Arm) -> Asker:
        server = self._servers[arm.name]
        more = {"cache_salt": uuid4().hex, **ROUNDS} if server["salted"] else {}
        fields = {"model": server["model"], **more, "stream_options": {"include_usage": True}}
        return Asker(client, self._plan.max_tokens, fields)

    def _ask_reference(self, prompt: Prompt) -> Reference:
        """Ask as arms are asked: a server's parser of a whole answer and that of a stream may write another text."""
        base = self._plan.base

        async def ask() -> Timed:
            async with httpx.AsyncClient(**self._fleet.reach(base)) as client:
                return await self._asker(client, self._arms[base]).ask(prompt)

        answer = asyncio.run(ask())
        return Reference(prompt, (), answer.tokens, (), answer.text, answer.calls)

    def _origin(self) -> dict[str, Any]:
        return provenance.made_by(("whiflash-sglang",))

    def _compare(self) -> tuple[Sequence[Difference], str]:
        return differences(self.cells, self._references, None, "", self._plan.base), ""


def _names(model: Mapping[str, Any]) -> set[str]:
    """Return the names of a model that a server lists, without their folders or owners."""
    given = (str(model[key]) for key in ("id", "root") if model.get(key))
    return {name.rstrip("/").rpartition("/")[2].casefold() for name in given}
