"""`whiflash lab evaluate`: replays a bundle's drafters on held-out prompts, or compares a server with the replay."""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from whiflash_sdk import Arm, Hints, Span, TraceError, routing

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.errors import ServerRefusedError
from whiflash_sglang.files.hosts import Answer, ServedArms, TokenIds, Tokenized
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.formats.router import Router
from whiflash_sglang.records.request import Request
from whiflash_sglang.routing.controller import route
from whiflash_sglang.routing.neural import note
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.spans.hints import RequestHints
from whiflash_train.answers.data import answer_rows, target_path
from whiflash_train.answers.prompts import balanced, prepare, read_rows
from whiflash_train.answers.served import ServedTarget, serve
from whiflash_train.answers.store import FeatureStore, SequenceRecord
from whiflash_train.answers.store import Sequence as Stored
from whiflash_train.config import Data, Hardware
from whiflash_train.origin import VocabularyMatrices
from whiflash_train.replay import JOINED, Pair, PairParts, Replay, replay_answers, replay_drafters
from whiflash_train.rounds import RoundTally, agreed
from whiflash_train.statistics import DRAWS
from whiflash_train.walk import LOOP, Choices, RouterWalk, choices_above, tabulate, walk

REPLAYED = {**JOINED, arms.LOOKUP: arms.LOOKUP, arms.NONE: arms.NONE}
"""The controller's arm → name of its replay in `walk`."""

ENTROPY_ROWS = 2048
"""Rows of logits that are in memory at a time."""

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


class KnownSignals(NamedTuple):
    """Signals of the controller at every position: the target's entropy in nats [P], and the router's outputs [P][3]
    (ΔAL, accepted drafts of EAGLE-3, of DFlash), empty without heads.
    """

    entropy: Sequence[float]
    predicted: Sequence[Sequence[float]]


def auto_choices(answers: Sequence[Replay], known: Sequence[KnownSignals]) -> list[Choices]:
    """Return the arm that `auto` chooses in each round of the answers; it learns on the way, as a server does.

    Drafts have full length. Nothing has a price, so `auto` maximises acceptance length.
    """
    policy = AutoPolicy(heads=any(one.predicted for one in known))
    return [_auto_run(policy, *one) for one in zip(answers, known, strict=True)]


def _auto_run(policy: AutoPolicy, answer: Replay, known: KnownSignals) -> Choices:
    """Route one answer by `auto` with the server's own code; its repetition loop counts as a separate request."""
    choices: dict[int, str] = {}

    def choose(position: int) -> str:
        forecast: dict[str, Forecast | None] = {
            arm: None for arm, replayed in JOINED.items() if replayed in answer.accepted
        }
        if (copied := float(answer.copies[position])) > 0:
            forecast[arms.LOOKUP] = Forecast(1 + copied, 1 + int(answer.proposed[position]))
        (arm,) = route(policy, [state], [forecast], None)
        if arm == arms.NONE and state.decision.promised:
            arm = arms.LOOKUP
        choices[position] = REPLAYED[arm]
        return choices[position]

    def learn(ended: int, emitted: int) -> None:
        """Learn as a server does after a round: committed tokens, and the signals at its end."""
        arm = state.previous or arms.NONE
        policy.observe(arm, state.decision, emitted)
        state.committed(arm, [0] * emitted)
        if ended < answer.positions:
            if "entropy" in policy.needs:
                state.entropy = known.entropy[ended]
            if known.predicted:
                note(state, known.predicted[ended])

    for begin, end in ((0, answer.loop_from), (answer.loop_from, answer.positions)):
        state = Request(answer.id, RequestHints())
        walk(answer, choose, begin, end, RoundTally(), learn=learn)
    return choices


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
    name, path = manifest.target, target_path(manifest.target)
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
        pair = Pair.load(parts, target)
        names = {row["id"] for row in chosen}
        answers = replay_answers(pair, store, names)
    return {
        "bundle": manifest.name,
        "prompts": len(chosen),
        "skipped": summary.skipped,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.hardware.dtype,
        **tabulate(answers, routers_of(bundle, answers, target)),
    }


def routers_of(bundle: Path, answers: Sequence[Replay], target: VocabularyMatrices) -> dict[str, RouterWalk]:
    """Return the choices of the entropy router at the bundle's threshold, if there are two drafters, and of `auto`
    without prices. Raises `CheckpointError` if the bundle's neural router cannot be used.
    """
    manifest = load_manifest(bundle)
    tau, dwell = manifest.entropy.tau, manifest.entropy.min_dwell
    nats = [entropy_of(answer.final, target.head).tolist() for answer in answers]
    walks = {}
    if len(manifest.drafters) == 2:
        walks["entropy"] = RouterWalk([choices_above(one, tau) for one in nats], dwell)
    router = None
    if manifest.router is not None:
        router = Router.load(
            bundle / manifest.router.path,
            hidden_size=target.head.shape[1],
            device=target.head.device,
            dtype=torch.float32,
            delta_sign=manifest.router.delta_sign,
        )
    known = [KnownSignals(one, predictions(router, each)) for one, each in zip(nats, answers, strict=True)]
    walks["auto-unpriced"] = RouterWalk(auto_choices(answers, known), copies=True)
    return walks


@torch.inference_mode()
def predictions(router: Router | None, answer: Replay) -> list[list[float]]:
    """Return a router's ΔAL and both heads at every position, [P][3]; empty without a router with heads."""
    if router is None or router.heads is None:
        return []
    delta, accepted = router.predict(answer.final)
    rows: list[list[float]] = torch.cat([delta[:, None], accepted], dim=1).tolist()
    return rows


def figures_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows and title of a table for a terminal."""
    overall = result["overall"]
    names, compared = list(overall["acceptance_length"]), list(overall["rounds_won"])
    groups = [*result["categories"].items(), ("overall", overall), (LOOP, result[LOOP])]
    rows = [
        [
            category,
            *(f"{figures['acceptance_length'][name]:.2f}" for name in names),
            *(f"{figures['rounds_won'][arm]:.0%}" for arm in compared),
        ]
        for category, figures in groups
        if figures is not None
    ]
    title = f"acceptance length, {result['bundle']}, {result['prompts']} prompts"
    return ["category", *names, *(f"{arm} better" for arm in compared)], rows, title


@torch.inference_mode()
def entropy_of(states: Tensor, head: Tensor) -> Tensor:
    """Return the entropy of the target's distribution in nats, [N] fp32. states: [N, H] after its final norm; head:
    [V, H]."""
    parts = []
    for rows in torch.split(states, ENTROPY_ROWS):
        log = F.linear(rows.to(head.device, head.dtype), head).float().log_softmax(-1)
        parts.append(-(log.exp() * log).sum(-1).cpu())
    return torch.cat(parts)


Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""
Rounds = list[tuple[int, int, int]]
"""Rounds as (answer position at which the round starts, as in `Replay`; its drafts; its accepted drafts)."""


def ask_server(asks: Asks, row: Mapping[str, Any], arm: Arm, longest: int) -> tuple[Text, Rounds]:
    """Ask a server for a greedy answer without a grammar, pinned to `arm`. Return the text and the rounds of `arm`,
    without the last one, which the answer's end may cut. Raises ServerRefusedError.
    """
    pinned = Span(kind="prose", open=True, prefer=arm, pin=True)
    hints = Hints(spans=[pinned], lookup="off", trace="full", learn=False)
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
    place = agreed(map(ord, text), map(ord, theirs))
    text, theirs = text[place:], theirs[place:]
    if not (text and theirs) and re.search("think|channel", text + theirs):
        who = "server" if theirs else "bundle"
        return "reasoning prefix", f"Only the {who}'s prompts end with {theirs or text!r}."
    return "template", f"The templates differ: {theirs[:40]!r} on the server, {text[:40]!r} in the bundle."


def unlike_target(sequence: Stored, head: Tensor) -> int:
    """Count the answer tokens that are not the first choice of the target with these final states."""
    size = sequence.record.prompt_length
    logits = F.linear(sequence.final[size - 1 :].to(head.device, head.dtype), head)
    return int((logits.argmax(-1).cpu() != sequence.tokens[size:]).sum())


def share(answers: Counts, values: Any, of: Any) -> list[float]:
    """Return sum(values) / sum(of), [rounds] each, with its 95 % bootstrap interval over answers: share, low, high."""
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
    """Compare a server's accepted drafts with the bundle's replay of the same answers. Return `positions` (drafts;
    served and, if prompts and target agree, offline: share, low, high), `cause` (None: both agree) and its `sentence`.

    Raises ServerRefusedError if the server does not answer or draft with `arm`, and the errors of `evaluate_bundle`.
    """
    manifest, rows = load_manifest(bundle), read_rows(prompts)
    jinja = None if manifest.chat_template is None else (bundle / manifest.chat_template).read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(target_path(manifest.target))
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
        own = prepare(row, tokenizer, jinja, 0.0).tokens
        cause = cause or prompt_cause(own, text[0], tokenizer, asks)
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
    last = TargetShape.read(target_path(name) / "config.json").num_layers - 2
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
                found[mine] = replay_drafters(pair, moved, named).accepted[arm][rounds[mine, 1]]
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
