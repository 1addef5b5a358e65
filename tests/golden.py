# ruff: noqa: E402  (the clock is replaced before anyone takes it)
"""The golden set: answers, p-values and names of one revision, which later ones are compared with.

    python tests/golden.py                              # compare answers, p-values and names, bit for bit
    python tests/golden.py --only greedy/auto names     # parts that begin so
    python tests/golden.py --record --only names        # record a part after a change that is meant

Tiny models answer in this process (`engine.py`), on a clock that counts calls of their modules, so no part depends on
the machine's speed. Another processor or torch may round in another way, p-values in their sixth digit: the record
names both. A greedy answer is recorded with its rounds and accepted drafts, since a drafter that falls silent changes
no text.
The exit code is 1 if anything differs.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from math import isclose
from pathlib import Path
from typing import Any

import torch

MODULE_CALL = 2.0**-17
"""Seconds on the clock that a call of a model's module takes: a power of two, so that no distance is rounded."""
_calls = [0]


def _called(*_: Any) -> None:
    _calls[0] += 1


torch.nn.modules.module.register_module_forward_pre_hook(_called)
time.perf_counter = time.thread_time = lambda: 1024.0 + _calls[0] * MODULE_CALL

HERE = Path(__file__).parent
sys.path.append(str(HERE / "worker"))

from engine import Engine, engine
from evidence import provenance
from expected import goodness_of_fit, joint
from model_set import Models, build_models
from oracle_arm import OracleArm
from overlap import overlapped
from pydantic import BaseModel
from request_sets import GRAMMARS, OPTIONS
from test_sampling import BASE, PARAMETERS, PROMPT, WINDOW, sample, sampling_engine
from traffic import Arrival, play
from whiflash_sdk.capabilities import Capabilities
from whiflash_sdk.hints import Hints
from whiflash_sdk.trace import Trace

from whiflash_sglang.serve.metrics import SERIES

RECORD = HERE.parent / "results" / "golden.json"
ENTROPY = {"entropy": {"tau": 2.0, "min_dwell": 1}}  # nats; about the tiny target's median
SMALL = {"max_total_tokens": 448}
EACH = 160
"""Sampled answers of a parameter set."""

LAUNCHES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "none": ("none", {}),
    "ar": ("ar", {}),
    "diffusion": ("diffusion", {}),
    "lookup": ("lookup", {}),
    "entropy": ("entropy", {"keys": ENTROPY}),
    "auto": ("auto", {}),
    "auto, one request": ("auto", {"max_running_requests": 1}),
    "auto, pages": ("auto", {"page_size": 16}),
    "auto, chunks": ("auto", {"chunked_prefill_size": 16}),
    "auto, small pool": ("auto", SMALL),
    "auto, bfloat16": ("auto", {"dtype": "bfloat16"}),
    "auto, batch": ("auto", {"max_running_requests": 24}),
    "auto, host cache": ("auto", {**SMALL, "enable_hierarchical_cache": True, "hicache_ratio": 6.0}),
    "auto, overlap": ("auto", {}),
    "auto, no drafters": ("auto", {"draft": None, "whiflash_eagle_draft": None}),
}
"""Router, and what else is launched with. Without a router SGLang decodes by itself."""
PEAKED = ("ar", "diffusion", "entropy", "auto", "auto, batch", "auto, bfloat16", "auto, overlap")
"""Launches of the target whose tokens random drafters often guess; others serve the one whose text varies more."""

SAMPLING: dict[str, tuple[str, dict[str, Any]]] = {
    "ar": ("ar", {}),
    "diffusion": ("diffusion", {"page_size": 16}),
    "entropy": ("entropy", {"keys": ENTROPY}),
    "lookup": ("lookup", {}),
}


def hinted(**hints: Any) -> dict[str, Any]:
    return {"custom_params": {"whiflash": json.dumps(hints)}}


def span(**fields: Any) -> dict[str, Any]:
    return hinted(spans=[{"kind": "json", **fields}], trace="full")


REQUEST_KINDS: dict[str, dict[str, Any]] = {
    "free": {"cache_salt": "one"},
    "again": {"cache_salt": "one"},
    "predicted": {},
    **{f"pinned to {arm}": span(open=True, prefer=arm, pin=True) for arm in ("ar", "diffusion", "lookup")},
    "bias": span(open=True, bias={"diffusion": 4.0}),
    "spans": span(begin="E", end="J", prefer="lookup"),
    "agent": hinted(agent="a"),
    "off": hinted(off=True),
    **{name: {"ignore_eos": False, **grammar} for name, grammar in GRAMMARS.items()},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.4},
    "min-new-tokens": {"min_new_tokens": 12, "stop_token_ids": [69, 70, 75, 80]},
    "logit-bias": {"logit_bias": {"70": 2.0, "80": -3.0}},
    "stop-string": {"stop": ["GG", "FH", "K"]},
    "logprobs": {"return_logprob": True},
}


def requests(expected: Mapping[str, list[int]]) -> list[Arrival]:
    """One of each kind. expected: plain decoding's answers, which predictions are made of."""
    rng = random.Random(47)
    arrivals = [
        Arrival(
            kind,
            rng.randint(0, 12),
            tuple(rng.choices(range(32, 127), k=rng.randint(8, 50))),
            {"max_new_tokens": 40, **({"max_new_tokens": 120} if kind in GRAMMARS else {}), **params},
        )
        for kind, params in REQUEST_KINDS.items()
    ]
    first = arrivals[0]
    arrivals[1] = replace(arrivals[1], step=60, prompt=first.prompt)
    broken = [token if rng.random() < 0.85 else 100 for token in expected.get("predicted", [])]
    if broken:
        arrivals[2].params["custom_params"] = {"whiflash_prediction": broken}
    return arrivals


def launched(models: Models, name: str) -> AbstractContextManager[Engine]:
    router, arguments = LAUNCHES[name]
    whiflash = None if router is None else models.whiflash(router, **arguments)
    start = overlapped if "overlap" in name else engine
    return start(models.target, whiflash=whiflash, **OPTIONS)


class Measured:
    """Behaviour of this revision, part by part: `greedy/NAME`, `sampling/NAME`, `names`."""

    def __init__(self, root: Path) -> None:
        self.models = build_models(root)
        self.peaked = build_models(root / "peaked", peaked=True)
        self._plain: dict[Path, dict[str, list[int]]] = {}

    @property
    def parts(self) -> dict[str, Callable[[], dict[str, str]]]:
        return {
            **{f"greedy/{name}": partial(self.greedy, name) for name in LAUNCHES},
            **{f"sampling/{name}": partial(self.sampling, name) for name in SAMPLING},
            "names": self.names,
        }

    def plain(self, models: Models) -> dict[str, list[int]]:
        """Plain decoding's answers."""
        if models.target not in self._plain:
            with launched(models, "plain") as e:
                self._plain[models.target] = play(e, requests({}))
        return self._plain[models.target]

    def greedy(self, name: str) -> dict[str, str]:
        """Request → rounds, accepted drafts, tokens."""
        models = self.peaked if name in PEAKED else self.models
        arrivals = requests(self.plain(models))
        with launched(models, name) as e:
            answers = play(e, arrivals)
            return {
                rid: "{} rounds, {} accepted: ".format(*e.rounds(rid)) + " ".join(map(str, tokens))
                for rid, tokens in answers.items()
            }

    def sampling(self, name: str) -> dict[str, str]:
        """Parameter set → p-value, χ² and its degrees of freedom, of answers that are sampled together."""
        router, arguments = SAMPLING[name]
        predicted = {"custom_params": {"whiflash_prediction": self.likely}} if router == "lookup" else {}
        oracle = OracleArm(0.9)  # learns the answers, and drafts nothing
        parameters = {kind: {**params, **predicted} for kind, params in PARAMETERS.items()}
        with sampling_engine(self.models, router, random_seed=47, **arguments) as e:
            torch.manual_seed(47)
            found = sample(e, oracle, parameters, EACH)
        tests = {kind: goodness_of_fit(answers, self.leaves[kind]) for kind, answers in found.items()}
        return {kind: f"p {test.p_value!r}, χ² {test.statistic!r}, df {test.freedom}" for kind, test in tests.items()}

    @cached_property
    def leaves(self) -> dict[str, dict[tuple[int, ...], float]]:
        """Parameter set → chances of what may be sampled."""
        target, rare = self.models.reference.target, 5 / EACH
        return {kind: joint(target, PROMPT, {**BASE, **params}, WINDOW, rare) for kind, params in PARAMETERS.items()}

    @cached_property
    def likely(self) -> list[int]:
        """The likeliest answer to what is sampled."""
        with engine(self.models.target) as e:
            return e.generate([PROMPT], max_new_tokens=9)[0]

    def names(self) -> dict[str, str]:
        """Names of metrics, of the state, and of hints and traces on the wire."""
        found = {f"metric {one.full_name}": f"{one.kind}, labels {list(one.labels)}" for one in SERIES}
        for model in (Hints, Trace, Capabilities):
            found |= {f"{model.__name__} {name}": kind for name, kind in fields(model)}
        with launched(self.models, "auto") as e:
            e.generate([PROMPT])
            state = e.worker.snapshot()
        for key, value in state.items():
            inner = sorted(value) if isinstance(value, dict) and key != "reasons" else []
            found[f"state {key}"] = f"{type(value).__name__} {inner}"
        return found


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Every field of a model and of the models inside, with its JSON schema."""
    schema = model.model_json_schema()
    for name, part in {"": schema, **schema.get("$defs", {})}.items():
        for field, kind in part.get("properties", {}).items():
            kept = {key: value for key, value in kind.items() if key not in ("title", "description")}
            yield f"{name}.{field}".lstrip("."), json.dumps(kept, sort_keys=True)


def differences(part: str, found: Mapping[str, str], recorded: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*recorded, *found]):
        new, old = found.get(key), recorded.get(key)
        if new is None or old is None:
            yield f"{part}: {key} is {'new' if old is None else 'gone'}"
        elif new != old and not (part.startswith("sampling") and _close(new, old)):
            yield f"{part}: {key}: {_first(new, old) if part.startswith('greedy/') else f'{new}, recorded {old}'}"


def _close(new: str, old: str) -> bool:
    """Whether counts were the same: the chances that they are tested against are rounded by the processor."""
    numbers = [[float(number) for number in re.findall(r"[\d.e+-]*\d", text)] for text in (new, old)]
    return all(isclose(*pair, rel_tol=1e-4) for pair in zip(*numbers, strict=True))


def _first(new: str, old: str) -> str:
    """The first token that differs, and else the drafts."""
    (drafts, tokens), (before, expected) = new.split(": "), old.split(": ")
    for place, pair in enumerate(zip_longest(tokens.split(), expected.split(), fillvalue="missing")):
        if pair[0] != pair[1]:
            return f"token {place} is {pair[0]}, recorded {pair[1]}"
    return f"the same text in {drafts}; recorded {before}"


def made_on() -> str:
    where = provenance()
    state = "" if where["clean"] else " with changes"
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("sglang", "torch"))
    return f"{where['commit'][:9]}{state}; {where['hardware']}, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write results/golden.json")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts whose names begin so")
    given = parser.parse_args()
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    here, count = made_on(), 0
    with tempfile.TemporaryDirectory() as root:
        measured = Measured(Path(root))
        for part in () if given.only != [""] else record.keys() - measured.parts.keys():
            print(f"{part}: is gone")
            del record[part]
            count += 1
        for part, measure in measured.parts.items():
            if not part.startswith(tuple(given.only)):
                continue
            began, found = time.monotonic(), measure()
            known = record.get(part, {"made": "never", "found": {}})
            lines = list(differences(part, found, known["found"]))
            differ = f"{len(lines)} of {len(found)} differ ({time.monotonic() - began:.0f} s)"
            print(f"{part}: {differ}", *lines, sep="\n  ", flush=True)
            if lines and not given.record:
                print(f"  recorded at {known['made']}\n  measured at {here}")
            count += len(lines)
            record[part] = {"made": here, "found": found}
    if given.record:
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return 0
    print(f"{count} differences")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
