"""`whiflash lab evaluate`: replays a bundle's drafters on held-out prompts, or compares a server with the replay."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from whiflash_sdk import Arm, Hints, Span, TraceError, routing

from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import common_prefix
from whiflash_sglang.drafts.rounds import RoundTally, acceptance_length, loop_start
from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.files.hosts import Answer, ServedArms, TokenIds, Tokenized
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.telemetry.statistics import DRAWS
from whiflash_train.answers.data import answer_rows, target_path
from whiflash_train.answers.prompts import balanced, prepare, read_rows
from whiflash_train.answers.served import ServedTarget, serve
from whiflash_train.answers.store import FeatureStore, SequenceRecord
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.config import Data, Hardware
from whiflash_train.origin import VocabularyMatrices
from whiflash_train.replay import Pair, PairParts, replay_drafters

LOOP = "loop"
"""Key of the figures of text that repeats itself."""

OTHER_TARGET = 0.05
"""Share of served tokens that are not the target's first choice, above which the server's weights must differ."""
SLACK = 0.05
"""Share of the rounds with accepted drafts that may differ because of rounding."""
FAULTS = ((-1, 0), (1, 0), (0, 1), (0, -1))
"""Faults that are tried: (layers above its own that a drafter reads, tokens by which its features are late)."""

Cause = tuple[str, str]
"""Cause of a difference: a word for programs and a sentence for people."""
Counts = NDArray[np.int64]


class ChosenAnswer(Answer):
    prompt_token_ids: TokenIds
    response_token_ids: TokenIds


class ChatAnswer(Answer):
    """An answer of `POST /v1/chat/completions` with token ids."""

    choices: Annotated[list[ChosenAnswer], Field(min_length=1, max_length=1)]


Asks = Callable[..., dict[str, Any]]
"""`hosts.ask` bound to one server; takes the route, the model of the answer and the body."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of a bundle's evaluation.

    Attributes:
        limit: prompts used, balanced over the categories; None takes all.
        work: where answers are kept for the next evaluation; None keeps nothing.
    """

    limit: int | None = None
    max_new_tokens: int = 160
    seed: int = 1
    work: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)


@contextmanager
def started_target(
    bundle: Path, layers: list[int], settings: EvaluationSettings, work: Path
) -> Iterator[tuple[ServedTarget, FeatureStore]]:
    """Start the bundle's target in an engine; yield it and a store for its outputs of `layers`, both with files in
    `work`."""
    manifest, hardware = load_manifest(bundle), settings.hardware
    template = None if manifest.chat_template is None else bundle / manifest.chat_template
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    data = Data(prompts=[], tool_choice_required=1.0, max_new_tokens=settings.max_new_tokens)
    name, path = manifest.target, target_path(manifest.target, manifest)
    with serve(path, name, layers, data, hardware, work=work, template=template, seed=settings.seed) as made:
        store = FeatureStore(work / "answers", hidden=made.hidden_size, layers=layers)
        store.truncate_to_index()
        yield made, store


def evaluate_bundle(bundle: Path, prompts: Path, settings: EvaluationSettings) -> dict[str, Any]:
    """Have the target answer the prompts (the first `limit`, balanced), replay the bundle's drafters on the answers,
    and return the figures of `tabulate` with their provenance.

    Raises `WhiflashError` for a bundle and `ValueError` for prompts that cannot be used.
    """
    rows, manifest = read_rows(prompts), load_manifest(bundle)
    parts = PairParts.of_bundle(bundle)
    chosen = list(balanced(rows, {}, settings.seed))[: settings.limit]
    with tempfile.TemporaryDirectory() as scratch:
        work = settings.work or Path(scratch)
        with started_target(bundle, parts.captured, settings, work) as (served, store):
            summary = answer_rows(chosen, served, store, keep_loops=True)
        target = VocabularyMatrices.read(work / "target", manifest.target, **settings.hardware.place)
        answers = replay_answers(Pair.load(parts, target), store, {row["id"] for row in chosen})
    return {
        "bundle": manifest.name,
        "prompts": len(chosen),
        "skipped": summary.skipped,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.hardware.dtype,
        **tabulate(answers),
    }


class Drafted(NamedTuple):
    """An answer whose drafts were replayed. accepted: drafter → accepted drafts by position, [P]. loop_from: position
    from which the text repeats itself, P if it never does.
    """

    category: str
    accepted: Mapping[str, Counts]
    loop_from: int


def replay_answers(pair: Pair, store: FeatureStore, names: Collection[str]) -> list[Drafted]:
    """Replay the drafters over the stored answers with ids in `names`; answers too short for a round are left out.

    Raises:
        ValueError: no answer is long enough.
    """
    answers = []
    for record in tracked([record for record in store.records if record.id in names], "replaying drafters"):
        if (positions := record.length - record.prompt_length - 1) < 1:
            continue
        sequence = store.read(record)
        text = sequence.tokens[record.prompt_length :].tolist()
        start = loop_start(text[:-1] if record.finished else text)
        accepted = replay_drafters(pair, sequence, store.layers)
        answers.append(Drafted(record.category, accepted, positions if start is None else min(start, positions)))
    if not answers:
        raise ValueError("no answer is long enough to replay: raise max_new_tokens or use other prompts")
    return answers


def tabulate(answers: Sequence[Drafted]) -> dict[str, Any]:
    """Compute the figures of every drafter, by category and overall.

    Returns:
        {"categories": {category: figures}, "overall": figures, "loop": figures or None}. `overall` weighs every
        category the same and leaves loops out. Figures: answers; positions; acceptance_length by drafter; rounds_won,
        the share of positions at which a drafter accepts strictly more than the other, if there are two.
    """
    groups: dict[str, list[Mapping[str, Counts]]] = defaultdict(list)
    for answer in answers:
        for name, part in ((answer.category, slice(answer.loop_from)), (LOOP, slice(answer.loop_from, None))):
            cut = {arm: accepted[part] for arm, accepted in answer.accepted.items()}
            if all(map(len, cut.values())):
                groups[name].append(cut)
    figures = {name: _figures(parts) for name, parts in sorted(groups.items())}
    loop, parts = figures.pop(LOOP, None), list(figures.values())
    overall: dict[str, Any] = {key: sum(one[key] for one in parts) for key in ("answers", "positions")}
    for key in ("acceptance_length", "rounds_won"):
        overall[key] = {arm: fmean(one[key][arm] for one in parts) for arm in (parts[0][key] if parts else ())}
    return {"categories": figures, "overall": overall, LOOP: loop}


def _figures(parts: Sequence[Mapping[str, Counts]]) -> dict[str, Any]:
    every = {arm: np.concatenate([part[arm] for part in parts]) for arm in parts[0]}
    tallies = {arm: [RoundTally.of(part[arm].tolist()) for part in parts] for arm in every}
    others = dict(zip(every, reversed(every), strict=True)) if len(every) == 2 else {}
    return {
        "answers": len(parts),
        "positions": max(map(len, every.values())),
        "acceptance_length": {arm: acceptance_length(tally) for arm, tally in tallies.items()},
        "rounds_won": {arm: float((every[arm] > every[other]).mean()) for arm, other in others.items()},
    }


def figures_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows and title of a table for a terminal."""
    groups = [*result["categories"].items(), ("overall", result["overall"]), (LOOP, result[LOOP])]
    groups = [(name, figures) for name, figures in groups if figures and figures["answers"]]
    names, compared = (list(groups[0][1][key]) for key in ("acceptance_length", "rounds_won"))
    rows = []
    for category, figures in groups:
        lengths = (f"{figures['acceptance_length'][name]:.2f}" for name in names)
        rows.append([category, *lengths, *(f"{figures['rounds_won'][arm]:.0%}" for arm in compared)])
    title = f"acceptance length, {result['bundle']}, {result['prompts']} prompts"
    return ["category", *names, *(f"{arm} better" for arm in compared)], rows, title


Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""
Rounds = list[tuple[int, int, int]]
"""Rounds as (answer position at which the round starts, as in `Replay`; its drafts; its accepted drafts)."""


def ask_server(asks: Asks, row: Mapping[str, Any], arm: Arm, longest: int) -> tuple[Text, Rounds]:
    """Ask a server for a greedy answer without a grammar, pinned to `arm`. Return the text and the rounds of `arm`,
    without the last one, which the answer's end may cut. Raises ServerRefusedError.
    """
    hints = Hints(spans=[Span(kind="prose", open=True, prefer=arm, pin=True)], lookup="off", trace="full", learn=False)
    body = {name: row[name] for name in ("messages", "tools") if row.get(name)}
    body |= {"temperature": 0, "max_tokens": longest, "return_token_ids": True, **hints.extra_body()}
    answer = asks("/v1/chat/completions", ChatAnswer, body)
    choice = answer["choices"][0]
    try:
        trace = routing(answer)
    except TraceError as error:
        raise ServerRefusedError(f"the server sent a trace of another shape ({error})") from None
    rounds: Rounds = []
    for stretch in trace.stretches if trace else ():
        begin = stretch.start - 1
        for tokens, drafts in zip(stretch.round_tokens or (), stretch.round_proposed or (), strict=True):
            if stretch.arm == arm and drafts:
                rounds.append((begin, drafts, tokens - 1))
            begin += tokens
    return (choice["prompt_token_ids"], choice["response_token_ids"]), rounds[:-1]


def prompt_cause(own: list[int], served: list[int], tokenizer: PreTrainedTokenizerBase, asks: Asks) -> Cause | None:
    """Find why a server's tokens of a prompt differ from the bundle's `own`; None: they are equal."""
    if own == served:
        return None
    text, theirs = str(tokenizer.decode(own)), str(tokenizer.decode(served))
    body = {"prompt": text, "add_special_tokens": False}
    if asks("/tokenize", Tokenized, body)["tokens"] != tokenizer.encode(text, add_special_tokens=False):
        return "tokenizer", f"The server's tokenizer is another: it splits {text[-60:]!r} otherwise."
    place = common_prefix(text, theirs)
    text, theirs = text[place:], theirs[place:]
    if not (text and theirs) and re.search("think|channel", text + theirs):
        who = "server" if theirs else "bundle"
        return "reasoning prefix", f"Only the {who}'s prompts end with {theirs or text!r}."
    return "template", f"The templates differ: {theirs[:40]!r} on the server, {text[:40]!r} in the bundle."


def unlike_target(sequence: Stored, head: Tensor) -> int:
    """Count the answer tokens that are not the argmax of `head` [V, H] at the final state before them."""
    size = sequence.record.prompt_length
    logits = F.linear(sequence.final[size - 1 :].to(head.device, head.dtype), head)
    return int((logits.argmax(-1).cpu() != sequence.tokens[size:]).sum())


def share(answers: Counts, values: Any, of: Any) -> list[float]:
    """Return sum(values) / sum(of) and the bounds of its 95 % bootstrap interval, which draws whole answers.

    answers, values, of: [rounds]; answers: number of each round's answer.
    """
    up, down = (np.bincount(answers, np.asarray(part, float)) for part in (values, of))
    drawn = np.random.default_rng(0).integers(0, len(up), (DRAWS, len(up)))
    bounds = np.percentile(up[drawn].sum(1) / np.maximum(down[drawn].sum(1), 1), [2.5, 97.5])
    return [float(up.sum() / max(down.sum(), 1)), *bounds.tolist()]


def drafter_cause(
    answers: Counts, served: Counts, replay: Callable[[int, int], Counts], faults: Iterable[tuple[int, int]]
) -> Cause | None:
    """Find why the server's rounds accept other drafts than the bundle's replay; None: they accept the same.

    answers, served: [rounds] number of the answer, accepted drafts. replay: returns the drafts that a faulty drafter
    gets accepted, by the layers and the tokens by which its features are shifted. faults: shifts to try.
    """

    def moved(above: int, late: int) -> list[float]:
        found = replay(above, late)
        return share(answers, served != found, (served > 0) | (found > 0))

    apart, low, _ = moved(0, 0)
    if low <= SLACK:
        return None
    begins = f"{apart:.0%} of the rounds with accepted drafts differ from their replay: "
    shares = {fault: moved(*fault) for fault in faults}
    above, late = min(shares, key=lambda fault: shares[fault][0])
    apart, low, _ = shares[above, late]
    if low > SLACK:
        return "drafter", f"{begins}prompts and target agree, so its drafter has other weights or settings."
    read = f"layers {above:+d} of its own" if above else f"features {late:+d} tokens late"
    ends = f"its drafter reads {read}, with which {apart:.0%} do."
    return "layer" if above else "positions", begins + ends


def compare_served(bundle: Path, prompts: Path, asks: Asks, arm: Arm, settings: EvaluationSettings) -> dict[str, Any]:
    """Compare a server's accepted drafts with the bundle's replay of the same answers.

    Returns `positions`, a list by place in a draft: `drafts`, their number; `served` and `offline` (None if prompts or
    target differ), each the accepted share and its bounds. `cause`: why they differ, else None; `sentence` says so.

    Raises ServerRefusedError if the server does not answer or draft with `arm`, and the errors of `evaluate_bundle`.
    """
    manifest, rows = load_manifest(bundle), read_rows(prompts)
    jinja = None if manifest.chat_template is None else (bundle / manifest.chat_template).read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(target_path(manifest.target, manifest))
    if arm not in manifest.drafters or arm not in asks("/whiflash/capabilities", ServedArms)["arms"]:
        raise ServerRefusedError(f"bundle and server do not both draft with {arm}: give another --arm")
    cause: Cause | None = None
    texts: list[Text] = []
    found: list[tuple[int, int, int, int]] = []
    for row in tracked(list(balanced(rows, {}, settings.seed))[: settings.limit], "asking the server"):
        text, its = ask_server(asks, row, arm, settings.max_new_tokens)
        if its:
            found += [(len(texts), *one) for one in its]
            texts.append(text)
        cause = cause or prompt_cause(prepare(row, tokenizer, jinja, 0.0).tokens, text[0], tokenizer, asks)
    if not found:
        raise ServerRefusedError(f"the server drafted no two rounds with {arm}: raise --max-new-tokens")
    rounds = np.array(found)
    numbers, _, drafts, served = rounds.T
    offline = None
    if cause is None:
        cause, offline = _replay(bundle, texts, rounds, arm, settings)
    positions = []
    for k in range(drafts.max()):
        both = {"offline": offline, "served": served}
        figures = {key: None if n is None else share(numbers, n > k, drafts > k) for key, n in both.items()}
        positions.append({"drafts": int((drafts > k).sum()), **figures})
    name, sentence = cause or (None, f"Both agree, in {len(found)} rounds of {len(texts)} answers.")
    return {"bundle": manifest.name, "arm": arm, "positions": positions, "cause": name, "sentence": sentence}


def _replay(
    bundle: Path, texts: Sequence[Text], rounds: Counts, arm: str, settings: EvaluationSettings
) -> tuple[Cause | None, Counts | None]:
    """Replay the served texts. Return why target or drafter differs from the bundle's, None if neither does; and the
    replay's accepted drafts, [rounds], None if the target differs."""
    name, parts = load_manifest(bundle).target, PairParts.of_bundle(bundle, int(rounds[:, 2].max()))
    read = parts._replace(checkpoints={arm: parts.checkpoints[arm]}).captured
    last = parts.num_layers - 2
    layers = sorted({near for layer in read for near in range(layer - 1, layer + 2) if 0 <= near <= last})
    with tempfile.TemporaryDirectory(dir=settings.work) as scratch:
        with started_target(bundle, layers, settings, Path(scratch)) as (target, store):
            whole = [prompt + answer for prompt, answer in texts]
            for n, states in target.states((n, text[:-1]) for n, text in enumerate(whole)):
                record = SequenceRecord(str(n), arm, len(texts[n][0]), len(whole[n]), False, False)
                store.append(record, whole[n], states)
        vocabulary = VocabularyMatrices.read(Path(scratch) / "target", name, **settings.hardware.place)
        wrong = sum(unlike_target(store.read(record), vocabulary.head) for record in store.records)
        if (other := wrong / sum(len(answer) for _, answer in texts)) > OTHER_TARGET:
            return ("target", f"{name} does not choose {other:.0%} of the served tokens: weights differ."), None
        pair = Pair.load(parts, vocabulary)
        # The other drafter is dropped, because its layers were not captured.
        head = pair.block_head if arm == arms.DIFFUSION else None
        pair = pair._replace(drafters={arm: pair.drafters[arm]}, block_head=head)

        def replay(above: int, late: int) -> Counts:
            found = np.zeros(len(rounds), np.int64)
            for record in tracked(store.records, "replaying the drafter"):
                sequence, mine = store.read(record), rounds[:, 0] == int(record.id)
                moved = sequence._replace(features=sequence.features.roll(late, 0))
                named = [layer - above for layer in layers]
                found[mine] = replay_drafters(pair, moved, named)[arm][rounds[mine, 1]]
            return np.minimum(found, rounds[:, 2])

        tried = [fault for fault in FAULTS if {layer + fault[0] for layer in read} <= {*layers}]
        return drafter_cause(rounds[:, 0], rounds[:, 3], replay, tried), replay(0, 0)


def positions_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows and title of a table of `compare_served`'s result, for a terminal."""
    rows = []
    for number, row in enumerate(result["positions"], 1):
        both = (row["offline"], row["served"])
        cells = ("" if one is None else "{:.1%} ({:.1%} to {:.1%})".format(*one) for one in both)
        rows.append([str(number), str(row["drafts"]), *cells])
    title = f"accepted drafts by position, {result['bundle']}, {result['arm']}"
    return ["position", "drafts", "offline", "served"], rows, title
