"""CPU time of planning and learning a round, by requests: `python tests/planning_time.py`.

The planner, the learner, the policy `auto` and the copying arm of a server where the host does not wait for the device,
over two drafters that draft nothing: no model runs, and SGLang is not imported. Every request copies from a text of its
own, which grows by two tokens a round; what the device would copy is known. Printed is the median of many rounds, in
milliseconds of one process.

With `--agents` requests are an agent's, and the structure arm looks, too: each has twenty tools in its prompt, writes
a line of prose and a call in turn, half of them as JSON and half in markup; of three one
is under a grammar. A round commits what a candidate of the host has right, and one token more; printed is also how many
these are.

With `--hash` no time is taken, so nothing is cut or left out for it, and a digest of what was planned is printed:
routes, what they were chosen on, and all candidates with their chances and parts. A faster planner has the same.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Sequence
from functools import cache, partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import xgrammar
from drafting import candidate_of
from transformers import AutoTokenizer
from whiflash_sdk.presets import TOOL_CALL_PARSERS

from whiflash_sglang.arms.base import Drafter, KVDrafter, of_text, widest_of
from whiflash_sglang.arms.length import DraftLength
from whiflash_sglang.arms.lookup import LookupArm
from whiflash_sglang.arms.structure import StructureArm
from whiflash_sglang.checkpoints.manifest import Lookup, Structure
from whiflash_sglang.copying.calibration import Agreement
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Candidate, common_prefix
from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.prices.round_clock import RoundClock, RoundTime
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications
from whiflash_sglang.records.core import Results, Round
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.round.planning import Planner, rows_of
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.vocabulary import Vocabulary, vocabulary_of
from whiflash_sglang.structure.matchers import Matcher, XGrammarMatcher
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.structure.tools import carried_tools
from whiflash_sglang.telemetry.tally import Tally

VOCABULARY, PROMPT, CONTEXT, NEW, COPIED = 1000, 64, 8192, 2, 24
ROWS = tuple(range(1, 4097, 8))


class Silent(KVDrafter):
    """A drafter that has only its name and width."""

    def __init__(self, arm: str, most: int) -> None:
        self.arm, self.max_drafts = arm, most
        self.length = DraftLength()

    def calibration(self, requests: Any, worth: Any) -> list[float]:
        return self.length.calibration(worth)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Any) -> None:
        self.length.observe(proposed=proposed, accepted=accepted, confidences=confidences)


class Batch:
    """So many requests that never end."""

    vocabulary = VOCABULARY
    token_bytes: Sequence[bytes] = ()

    def __init__(self, size: int, seed: int = 0, *, timed: bool = True) -> None:
        self.random, self.size = random.Random(seed), size
        self.rounds = self.tokens = 0
        self.planned = hashlib.sha256()
        spending = Spending() if timed else Spending(clock=float, wall=float, cuts=False)
        self.drafters: dict[str, Drafter] = {
            arms.AR: Silent(arms.AR, 5),
            arms.DIFFUSION: Silent(arms.DIFFUSION, 15),
            arms.LOOKUP: LookupArm(Lookup(), late=True),
            **self._more_drafters(spending),
        }
        held = Quarantine(self.drafters, from_text=of_text(self.drafters))
        sync = DraftSync(self.drafters, 256, 1, torch.float32, held)
        sync.allocate(torch.zeros((size + 1, 1), dtype=torch.int32))
        costs = Costs(lambda arm: rows_of(self.drafters, arm))
        seconds = Sizes(ROWS, tuple(0.007 + 0.00002 * rows for rows in ROWS))
        drafts = {arm: Sizes((1, 4096), (0.001, 0.002)) for arm in (arms.AR, arms.DIFFUSION)}
        costs.tables = CostTables(Verifications(0, 1, seconds, seconds), drafts, {})
        controller, clock = Controller(AutoPolicy(), costs, self.token_bytes), RoundClock()
        sources = DraftSources(self.drafters, held, self.vocabulary, spending)
        self.planner = Planner(self.drafters, sync, controller, clock, held, sources)
        self.learner = Learner(self.drafters, controller, clock, Tally.of(self.drafters), held, sources.proposers)
        self.requests: list[Any] = []
        self.running = controller.states
        for row in range(1, size + 1):
            req, hints, tenant = self._request(row)
            self.requests.append(req)
            prompt = len(req.origin_input_ids)
            request = Request(
                req.rid, hints, row, tenant, None, req.grammar, prompt, partial(tuple, req.origin_input_ids)
            )
            controller.open(request, ())
            for drafter in of_text(self.drafters).values():
                drafter.begin(request)

    def _more_drafters(self, spending: Spending) -> dict[str, Drafter]:
        return {}

    def _request(self, row: int) -> tuple[Any, RequestHints, bytes | None]:
        """One, its hints and its tenant."""
        text = self.random.choices(range(VOCABULARY), k=PROMPT) * 2
        known = SimpleNamespace(rid=str(row), origin_input_ids=text, output_ids=[text[0]], grammar=None)
        return known, RequestHints(), None

    def _following(self, req: Any, count: int) -> list[int]:
        """The tokens that a request writes next."""
        at, text = len(req.output_ids), req.origin_input_ids
        return [text[(at + i) % PROMPT] for i in range(count)]

    def _committed(self, req: Any, tokens: list[int]) -> None:
        """Commit as the scheduler does."""
        req.output_ids += tokens

    def round(self) -> float:
        """CPU seconds of planning a round and of learning from it."""
        round_, spent = self.plan()
        return spent + self.learn(round_, self.results(round_))

    def plan(self) -> tuple[Round, float]:
        """A round as it is planned while those before it run that were not learned, and its CPU seconds."""
        known, rows = self._lengths(), list(range(1, self.size + 1))
        under_way = list(map(self.planner.under_way, rows))
        round_ = Round(
            rows=torch.tensor(rows),
            row_ids=rows,
            starts=torch.tensor(known),
            least=[n + min(more, 1) for n, more in zip(known, under_way, strict=True)],
            most=[n + more for n, more in zip(known, under_way, strict=True)],
            bonus=torch.zeros(self.size, dtype=torch.int64),
            reqs=self.requests,
            budgets=[CONTEXT] * self.size,
        )
        began = time.process_time()
        self.planner.plan(round_)
        spent, round_.packed_rows = time.process_time() - began, self.size  # no draft stage runs
        self._note(round_)
        return round_, spent

    def _lengths(self) -> list[int]:
        return [len(req.origin_input_ids) + len(req.output_ids) - 1 for req in self.requests]

    def learn(self, round_: Round, results: Results) -> float:
        """CPU seconds of learning from a round."""
        began = time.process_time()
        tokens = self.learner.learn(round_, results)
        self.learner.timed(self._time(round_, results))
        spent = time.process_time() - began
        for req, new in zip(self.requests, tokens, strict=True):
            self._committed(req, new)
        return spent

    def _time(self, round_: Round, results: Results) -> RoundTime:
        """Return the time of a round that prices learn from."""
        return RoundTime(4 * self.size, self.size, tokens=NEW * self.size, seconds=0.01)

    def _note(self, round_: Round) -> None:
        """Add what was planned to the digest."""
        for index, (route, decision) in enumerate(zip(round_.plan.routes, round_.decisions, strict=True)):
            candidates = [
                (arm, list(each.tokens), list(each.alive), list(map(tuple, each.parts)), each.at)
                for arm, each in self.candidates(round_, index).items()
            ]
            self.planned.update(repr((route, dict(decision.expected), candidates)).encode())

    def candidates(self, round_: Round, index: int) -> dict[str, Candidate]:
        """A request's candidates that may be verified, by arm."""
        found, proposing = round_.plan.candidates, self.planner.sources.proposers[1:]
        columns = () if found is None else [column for column, size in enumerate(found.sizes[index]) if size]
        return {proposing[column]: candidate_of(found, index, column, proposing) for column in columns}

    def _brought(self, round_: Round, index: int) -> int:
        """Tokens that the round commits of a request."""
        return NEW

    def results(self, round_: Round) -> Results:
        """The results of such a round: three drafts each."""
        many, lengths = self.size, self._lengths()
        copies = [self._following(req, COPIED) for req in self.requests]
        new = [copy[: self._brought(round_, index)] for index, copy in enumerate(copies)]
        self.rounds, self.tokens = self.rounds + 1, self.tokens + sum(map(len, new))
        return Results(
            starts=lengths,
            widths=[4] * many,
            first_drafts=[3] * many,
            drafts=[[run[0], 0, 0] for run in new],
            drafted=[3] * many,
            source=[0] * many,
            bonus=[0] * many,
            seq_lens=lengths,
            tokens=new,
            accept_lens=[len(run) for run in new],
            confidences=[[0.7, 0.5, 0.4]] * many,
            faults=[0] * many,
            wanted=[3] * many,
            entropy=[0.4] * many,
            copies=copies,
            copied=[COPIED] * many,
            copy_alive=[[0.9**depth for depth in range(1, COPIED + 1)]] * many,
            copy_matched=[32] * many,
            copy_agreements=[[Agreement.UNANIMOUS] * COPIED] * many,
        )


TOOLS = [
    (
        f"{verb}_{noun}",
        {
            "type": "object",
            "properties": {
                f"{noun}_id": {"type": "string"},
                "unit": {"enum": ["metric", "imperial", "both"]},
                "days": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": [f"{noun}_id", "unit", "days"],
        },
    )
    for verb in ("get", "list", "update", "remove")
    for noun in ("order", "flight", "report", "invoice", "ticket")
]
FORMS = ("hermes", "qwen3_coder")
PROSE = "I will look that up for you before we change anything else, so please wait a moment.\n"


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ensure_target())


@cache
def vocabulary() -> Vocabulary:
    return vocabulary_of(tokenizer())


@cache
def compiled(schema: str) -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=len(tokenizer()))
    return xgrammar.GrammarCompiler(info).compile_json_schema(schema)


class Constraint:
    """A grammar over a list of objects that never ends, as SGLang keeps one of a request."""

    end = None

    def __init__(self, prompt: int) -> None:
        variants = [
            {"type": "object", "properties": {"name": {"const": name}, "arguments": schema}, "required": ["name"]}
            for name, schema in TOOLS
        ]
        self.schema = json.dumps({"type": "array", "items": {"anyOf": variants}})
        self.raw = xgrammar.GrammarMatcher(compiled(self.schema), max_rollback_tokens=200)
        self.begins = prompt

    def accept(self, tokens: list[int]) -> None:
        assert all(map(self.raw.accept_token, tokens))

    def beginning(self, vocabulary: Vocabulary) -> Matcher:
        return XGrammarMatcher(xgrammar.GrammarMatcher(compiled(self.schema)), None, len(vocabulary.token_bytes))


class Agents(Batch):
    """So many requests of agents."""

    def __init__(self, size: int, seed: int = 0, *, timed: bool = True) -> None:
        self.vocabulary, self.token_bytes = len(vocabulary().token_bytes), vocabulary().token_bytes
        super().__init__(size, seed, timed=timed)

    def _more_drafters(self, spending: Spending) -> dict[str, Drafter]:
        return {arms.STRUCTURE: StructureArm(Structure(), vocabulary(), spending)}

    def _request(self, row: int) -> tuple[Any, RequestHints, bytes | None]:
        form, encode = FORMS[row % 2], vocabulary().encode
        tools = carried_tools(TOOLS, form)
        assert tools is not None
        text = encode(tools + "".join(self._turn(form) for _ in range(3)))
        grammar = Constraint(len(text)) if row % 3 == 0 else None
        turns = range(CONTEXT // 64)
        if grammar is None:
            answer = PROSE[self.random.randrange(len(PROSE)) :] + "".join(self._turn(form) for _ in turns)
        else:
            answer = json.dumps([self._call() for _ in turns])
        written = encode(answer)
        req = SimpleNamespace(
            rid=str(row), origin_input_ids=text, output_ids=written[:1], grammar=grammar, answer=written
        )
        if grammar is not None:
            grammar.accept(written[:1])
        return req, RequestHints(spans=list(TOOL_CALL_PARSERS[form]), tools=tools, inferred=True), b"tenant"

    def _call(self) -> dict[str, Any]:
        name, schema = self.random.choice(TOOLS)
        values = f"{self.random.randrange(10**6)}", self.random.choice(["metric", "both"]), 3
        arguments = dict(zip(schema["properties"], values, strict=False))
        return {"name": name, "arguments": arguments}

    def _turn(self, form: str) -> str:
        call = self._call()
        if form == "hermes":
            return f"{PROSE}<tool_call>\n{json.dumps(call)}\n</tool_call>\n"
        arguments = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in call["arguments"].items())
        return f"{PROSE}<tool_call>\n<function={call['name']}>\n{arguments}</function>\n</tool_call>\n"

    def _following(self, req: Any, count: int) -> list[int]:
        at = len(req.output_ids)
        return list(req.answer[at : at + count])

    def verified(self, round_: Round, index: int) -> Sequence[int]:
        """The drafts of the host's candidate that has most of them right; none of one that the text has left, and none
        that do not pay (`choose_drafts`).
        """
        req, now, most = self.requests[index], len(self.requests[index].output_ids), widest_of(self.drafters)
        drafts, price = list[Sequence[int]]([()]), round_.plan.worth.least_chance
        for each in self.candidates(round_, index).values():
            at = each.at - len(req.origin_input_ids)
            if list(each.tokens[: now - at]) == req.answer[at:now]:
                least = each.least_chance(price, now - at)
                pays = sum(chance >= least for chance in each.alive)
                drafts.append(each.tokens[now - at : pays][:most])
        return max(drafts, key=lambda tokens: common_prefix(tokens, self._following(req, most)))

    def _brought(self, round_: Round, index: int) -> int:
        drafts = self.verified(round_, index)
        return 1 + common_prefix(drafts, self._following(self.requests[index], len(drafts)))

    def _committed(self, req: Any, tokens: list[int]) -> None:
        super()._committed(req, tokens)
        if req.grammar is not None:
            req.grammar.accept(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 48, 128])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--agents", action="store_true", help="with tools, forms of calls and grammars")
    parser.add_argument("--hash", action="store_true", help="print a digest of what was planned")
    given = parser.parse_args()
    for size in given.requests:
        batch = (Agents if given.agents else Batch)(size, timed=not given.hash)
        spent = [batch.round() for _ in range(given.rounds)]
        brought = batch.tokens / batch.rounds / size
        print(
            f"{size:4d} requests: {1000 * median(spent):.2f} ms to plan and learn a round, {1000 * min(spent):.2f} at "
            f"least; {brought:.2f} tokens a request{given.hash * f'; {batch.planned.hexdigest()[:12]}'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
