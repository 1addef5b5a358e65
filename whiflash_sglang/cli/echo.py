"""`whiflash check --echo`: compare a server's texts, for every arm and width of verification, with plain decoding.

The prompts ask it to repeat identifiers. These are opaque, so each token of a copy is unlikely unless the target reads
the right position. A wrong position or cache slot at one width changes one identifier in a hundred, which short texts
do not show.
"""

import base64
import itertools
import json
import math
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from whiflash_sdk.trace import Trace

from whiflash_sglang.drafts.arms import LOOKUP, NONE
from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.files.equality import TopTwo, Verdict, is_tie
from whiflash_sglang.files.hosts import Answer, TokenIds, ask

AT_ONCE = 12
"""Concurrent requests, and prompts of a sweep."""
IDENTIFIERS, LENGTH, DRAFTS, RESUMED = 6, 160, 16, 4
"""Identifiers of a prompt; most tokens of an answer; number of lengths of short answers, which have room for 0 to 15
drafts; times that an answer is resumed from plain decoding's text after a difference."""
LONGEST = 4096
"""Most tokens of a stretch; a trace with more is refused."""
PLAIN, POLICY, PREFILL = "plain", "policy", ("prefill", 1)
"""Labels of the counts: plain decoding of concurrent requests; the policy in force; tokens that no round verified."""
GRAMMARS: Sequence[Mapping[str, Any]] = (
    {"regex": rf"(identifier [0-9A-Za-z+/=_.-]{{4,80}}\n){{{IDENTIFIERS}}}"},
    {"json_schema": json.dumps({"type": "array", "items": {"type": "string"}, "maxItems": IDENTIFIERS})},
)
FREE: Mapping[str, Any] = {"ignore_eos": True}
Body = dict[str, Any]
Asked = tuple[Sequence[int], Mapping[str, Any]]
"""A prompt's token ids, and its sampling parameters."""


class MetaInfo(Answer):
    whiflash: Trace
    output_top_logprobs: list[list[tuple[float | None, Any, Any]]] | None = None


class Generated(Answer):
    """An answer of `POST /generate`."""

    output_ids: TokenIds
    meta_info: MetaInfo


def over_http(client: httpx.Client, url: str, bodies: Sequence[Body], *, tenant_header: bool = False) -> Sequence[Body]:
    """Send the bodies to `/generate` concurrently and return the server's answers. Raises ServerRefusedError.

    tenant_header: whether the server reads the key of its prefix cache from the gateway's header only.
    """

    def answer(body: Body) -> Body:
        headers = {"X-WhiFlash-Tenant": body["extra_key"]} if tenant_header else None
        return ask(client, url, "/generate", Generated, body, headers)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(answer, bodies))


def prompts(seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield prompts that list identifiers twice and begin a third list, with sampling parameters; every third one has
    a grammar.
    """
    rng = random.Random(seed)
    for params in itertools.cycle((FREE, FREE, GRAMMARS[0], FREE, FREE, GRAMMARS[1])):
        raw = [rng.randbytes(16) for _ in range(IDENTIFIERS)]
        forms = [raw[0].hex(), str(uuid.UUID(bytes=raw[1])), base64.b64encode(raw[2]).decode()]
        forms += [str(int.from_bytes(raw[3])), f"log-{raw[4].hex()}.tar.gz", f"src/{raw[5][:9].hex()}.py"]
        listed = "\n".join(["Identifiers:", *rng.sample(forms, len(forms)), "", ""])
        yield f"{listed}{listed}Identifiers:\n", params


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt with plain decoding's answer: its tokens, and the gap of the two best log-probabilities at each.

    pin: the arm that must write the tokens from `begin` to `end`. key: `extra_key` of the prefix cache.
    """

    prompt: Sequence[int]
    params: Mapping[str, Any]
    end: int
    key: str
    tokens: Sequence[int] = ()
    gaps: Sequence[float] = ()
    pin: str = NONE
    begin: int = 0

    def body(self) -> Body:
        """Return the request's body for `/generate`."""
        hints: Body = {"trace": "full", "infer": False, "learn": False, "off": self.pin == NONE}
        if self.pin not in (NONE, POLICY):
            hints["spans"] = [{"kind": "prose", "open": True, "prefer": self.pin, "pin": True}]
            hints["lookup"] = "on" if self.pin == LOOKUP else "off"
        params = {**self.params, "temperature": 0, "max_new_tokens": self.end - self.begin}
        params["custom_params"] = {"whiflash": json.dumps(hints)}
        ids = [*self.prompt, *self.tokens[: self.begin]]
        return {"input_ids": ids, "extra_key": self.key, "sampling_params": params}


@dataclass
class Echo:
    """Counts of a server's tokens by arm, width (1: no drafts) and verdict. ask: sends bodies to `/generate` at once.

    length: most tokens of an answer, `LENGTH`. wrong: arm, width and place of each token that differs.
    """

    ask: Callable[[Sequence[Body]], Sequence[Body]]
    arms: Sequence[str]
    dtype: str
    length: int
    counts: Counter[tuple[str, int, Verdict]] = field(default_factory=Counter)
    wrong: list[Body] = field(default_factory=list)
    _spoiled: set[str] = field(default_factory=set)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def sweep(self, asked: Sequence[Asked]) -> Iterator[None]:
        """Run plain decoding on each prompt alone, then all prompts at once with every arm; yield after each step."""
        plain = list[Job]()
        for request in asked:
            plain.append(self._plain(Job(*request, self.length, _key())))
            yield
        pins = [NONE, *(arm for arm in self.arms if arm != NONE), POLICY]
        for pinned in [*([pin] for pin in pins), pins]:  # the last time each request has its own arm
            of_jobs = zip(plain, itertools.cycle(pinned), strict=False)
            jobs = [replace(request, pin=pin, key=_key()) for request, pin in of_jobs]
            self._run(jobs)  # the prompts are not in the prefix cache yet,
            self._run(jobs)  # and now they are
            # Short answers after a prefix whose KV these rounds wrote, so that every width is verified often.
            free = [job for job in jobs if job.params == FREE and job.key not in self._spoiled]
            drawn = [(job, self._rng.randrange(self.length - DRAFTS)) for job in free for _ in range(DRAFTS)]
            rooms = itertools.cycle(range(DRAFTS))
            self._run([replace(job, begin=at, end=at + 2 + next(rooms)) for job, at in drawn])
            yield

    def rows(self) -> list[Body]:
        """Return a row for each arm and width: tokens compared, ties, wrong tokens, and the wrong tokens allowed.

        float32 allows none; other dtypes as many as plain decoding's own rate of wrong tokens gives, plus three sigma.
        """
        own = {verdict: self.counts[PLAIN, 1, verdict] for verdict in Verdict}
        rate = (own[Verdict.DIFFERENT] + 1) / max(sum(own.values()), 1)
        rows = []
        for arm, width in sorted({key[:2] for key in self.counts}):
            same, ties, wrong = (self.counts[arm, width, verdict] for verdict in Verdict)
            tokens = same + ties + wrong
            allowed = 0 if self.dtype == "float32" else int(rate * tokens + 3 * math.sqrt(rate * tokens))
            row = {"arm": arm, "width": width, "tokens": tokens, "ties": ties, "wrong": wrong}
            rows.append({**row, "allowed": allowed})
        return rows

    def _plain(self, job: Job) -> Job:
        (answer,) = self.ask([job.body() | {"return_logprob": True, "top_logprobs_num": 2}])
        tops = answer["meta_info"].get("output_top_logprobs") or []
        if not 0 < len(answer["output_ids"]) <= len(tops):
            raise ServerRefusedError("the server answered without tokens or their log-probabilities: see its log")
        best = [[entry[0] for entry in top if entry[0] is not None] for top in tops]
        gaps = [two[0] - two[1] if len(two) > 1 else math.inf for two in best]
        return replace(job, tokens=answer["output_ids"], gaps=gaps)

    def _run(self, jobs: Sequence[Job]) -> None:
        for _ in range(1 + RESUMED):
            answers = self.ask([job.body() for job in jobs]) if jobs else []
            ends = [self._compared(job, answer) for job, answer in zip(jobs, answers, strict=True)]
            # A grammar cannot begin inside its answer, so only free text is resumed, under a key without wrong KV.
            jobs = [
                replace(job, begin=end, key=_key())
                for job, end in zip(jobs, ends, strict=True)
                if end < job.end and job.params == FREE
            ]

    def _compared(self, job: Job, answer: Body) -> int:
        """Count an answer's tokens until one differs from plain decoding; return the place after it, or the end."""
        rounds = dict(_rounds(answer["meta_info"]["whiflash"]))
        both = itertools.zip_longest(job.tokens[job.begin : job.end], answer["output_ids"])
        for at, (plain, got) in enumerate(both):
            arm, width = rounds.get(at, PREFILL)
            arm, place = PLAIN if job.pin == NONE == arm else arm, job.begin + at
            verdict = Verdict.IDENTICAL if plain == got else Verdict.DIFFERENT
            # Log-probabilities give the gap only. Other dtypes need the best logit, too, so there ties are not known.
            if plain != got and None not in (plain, got) and self.dtype == "float32":
                tie = is_tie(TopTwo(best=0.0, gap=job.gaps[place]), self.dtype)
                verdict = Verdict.TIE if tie else verdict
            self.counts[arm, width, verdict] += 1
            if verdict is Verdict.DIFFERENT:
                of_place = {"arm": arm, "width": width, "asked": job.pin, "place": place}
                self.wrong.append({**of_place, "plain": plain, "got": got})
            if plain != got:
                self._spoiled.add(job.key)
                return place + 1
        return job.end


def _key() -> str:
    return f"echo-{uuid.uuid4()}"


def _rounds(trace: Body) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield each output token's place with the arm and width of the round that committed it."""
    for stretch in trace["stretches"]:
        at, emitted, drafts = (stretch["start"], stretch.get("round_tokens") or (), stretch.get("round_proposed") or ())
        if len(emitted) != len(drafts) or sum(map(abs, emitted)) > LONGEST:
            raise ServerRefusedError("the server sent a trace that is no answer's: update it")
        for tokens, proposed in zip(emitted, drafts, strict=True):
            yield from ((place, (stretch["arm"], 1 + proposed)) for place in range(at, at + tokens))
            at += tokens
