"""Measure a server that learns its traffic: what that brings, what it costs meanwhile, and how long it takes.

    python scripts/learn_traffic.py PROMPTS WORK --tokens 12000 36000 --json FILE --markdown FILE

PROMPTS is a file of one application's prompts, as `whiflash bench --prompts` takes it. Some of each category judge,
the others are the traffic. One server of the embedded target keeps samples of its answers to the traffic. After each
amount of answer tokens `whiflash learn` trains on the newest ones, beside as many of the original training, and
switches the server if a drafter got better.

Judging prompts are asked again and again, while the versions take turns; so are held-out prompts of training's own
kinds (home). These requests leave no sample, and copy from their own context only. Drafters are also walked alone over
answers to prompts that nobody learned from, without a server.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import httpx
import outcome
import psutil
from learn_elsewhere import DATA, drawn

from whiflash_sglang.checkpoints.hub import member
from whiflash_sglang.checkpoints.manifest import PARTS, embedded_bundle, load_manifest
from whiflash_sglang.cli.serve import server_arguments, server_environment
from whiflash_sglang.cli.train import resolve_config
from whiflash_sglang.lab.bench.pages import table
from whiflash_sglang.lab.bench.prompts import Prompt, load_prompts
from whiflash_sglang.learn.versions import read_version, versions_of
from whiflash_sglang.learner.judge import Walked, gains, walk_answers
from whiflash_sglang.learner.once import parts_of
from whiflash_sglang.learner.pace import Pace
from whiflash_sglang.progress import tracked
from whiflash_sglang.serving import Server
from whiflash_sglang.train.answers.data import answer_rows, load_target
from whiflash_sglang.train.answers.store import FeatureStore
from whiflash_sglang.train.answers.tokens import rebuild_features
from whiflash_sglang.train.config import Slots
from whiflash_sglang.train.replay import Pair, ReplayLog

CONFIG = "smollm2-135m-instruct"
WHIFLASH = str(Path(sys.executable).with_name("whiflash"))
HELD_OUT = Path(__file__).parents[1] / "results" / "benchmark" / "held-out.jsonl"
SHARES = (0.1, 0.5)
LOADED = 15.0
"""Seconds of a core with which a learner has its imports and its target behind it. It rests for them, too."""
FRESH = 3000
"""Answer tokens without which a learner would have nothing new to judge by, and would end."""
WALKED = 54
"""The last prompts of the traffic, which are never asked: their answers are walked beside those to judging prompts."""
WRITTEN = 12.0
"""Seconds after which the samples of finished requests are on the disk."""


class Turn(NamedTuple):
    """Prompts asked one by one. rate: output tokens a second, prefills included. texts: the answers."""

    rate: float
    texts: list[str]


class Asking:
    """Requests to one server."""

    def __init__(self, server: Server, tokens: int) -> None:
        self._tokens = tokens
        self._client = httpx.Client(base_url=server.base_url, timeout=600)
        self.url = server.base_url

    def stream(self, prompts: Iterator[Prompt], wanted: int) -> tuple[int, int]:
        """Traffic, four requests at a time, until `wanted` answer tokens: the prompts, and how many tokens came."""
        asked, written = 0, 0
        with ThreadPoolExecutor(4) as pool:
            while written < wanted:
                batch = [prompt for _, prompt in zip(range(16), prompts, strict=False)]
                if not batch:
                    raise SystemExit(f"the prompts end after {written} of {wanted} answer tokens: give more")
                asked += len(batch)
                written += sum(tokens for tokens, _ in pool.map(self._ask, batch))
                print(f"{written} answer tokens", file=sys.stderr, flush=True)
        return asked, written

    def turn(self, prompts: Sequence[Prompt]) -> Turn:
        """Every prompt once, none of them kept."""
        began = time.monotonic()
        found = [self._ask(prompt, learn=False, lookup="context") for prompt in prompts]
        seconds = time.monotonic() - began
        return Turn(sum(tokens for tokens, _ in found) / seconds, [text for _, text in found])

    def use(self, version: int) -> None:
        """Switch the drafters' weights."""
        self._client.post("/whiflash/drafters", json={"version": version}).raise_for_status()

    def _ask(self, prompt: Prompt, **hints: Any) -> tuple[int, str]:
        body = {
            "model": "default",
            "messages": list(prompt.messages),
            "temperature": 0,
            "max_tokens": self._tokens,
        }
        if hints:
            body["custom_params"] = {"whiflash": json.dumps(hints)}
        answer = self._client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        found = answer.json()
        return found["usage"]["completion_tokens"], found["choices"][0]["message"]["content"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", type=Path, help="prompts of one application")
    parser.add_argument(
        "work", type=Path, help="samples, versions and answers are kept here; a killed run goes on"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[12000, 36000], help="answer tokens of each amount"
    )
    parser.add_argument("--judges", type=int, default=1, help="prompts of each category that judge in a turn")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--turns", type=int, default=3, help="turns of each version, and of each share")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    given = parser.parse_args()
    asked = load_prompts(str(given.prompts))
    judges, traffic = split(asked, given.judges)
    home, _ = split([prompt for prompt in load_prompts(str(HELD_OUT)) if not prompt.tools], 2)
    samples = given.work / "learn"
    samples.mkdir(parents=True, exist_ok=True)
    flags = ["--context-length", "8192", "--device", "cpu", "--whiflash-learn", str(samples)]
    kept = given.work / "passes.jsonl"
    passes = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    stream = iter(traffic[sum(one["asked"] for one in passes) : -WALKED])
    with Server(server_arguments(flags), env=server_environment(flags)) as server:
        asking = Asking(server, given.answer)
        for wanted in given.tokens[len(passes) :]:
            asking.use(max((found["version"] or 0 for found in passes), default=0))
            passes.append(one_pass(asking, samples, stream, wanted))
            with kept.open("a") as file:
                print(json.dumps(passes[-1]), file=file)
        asking.stream(stream, FRESH)
        time.sleep(WRITTEN)
        cost = costs(asking, samples, judges[:8], given.turns)
        versions = list(dict.fromkeys([0, *(found["version"] for found in passes if found["version"])]))
        rates, texts = curve(asking, versions, {"away": judges, "home": home}, given.turns)
    alone = walked(given.work, samples, versions, [*judges, *traffic[-WALKED:]])
    found = {"passes": passes, "cost": cost, "rates": rates, "other_texts": texts, "alone": alone}
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    report(found, given, len(judges), len(home))


def one_pass(asking: Asking, samples: Path, stream: Iterator[Prompt], wanted: int) -> dict[str, Any]:
    """Traffic, and a pass over what was kept of it."""
    asked, written = asking.stream(stream, wanted)
    ended = time.monotonic()
    time.sleep(WRITTEN)
    found = learned(samples, asking.url, wanted)
    return {"asked": asked, "written": written, **found, "until_served": time.monotonic() - ended}


def split(prompts: Sequence[Prompt], each: int) -> tuple[list[Prompt], list[Prompt]]:
    """The first `each` of every category, and the others in random order."""
    count: dict[str, int] = defaultdict(int)
    first, others = [], []
    for prompt in prompts:
        (first if count[prompt.category] < each else others).append(prompt)
        count[prompt.category] += 1
    Random(0).shuffle(others)
    return first, others


def learn(samples: Path, *options: str) -> list[str]:
    """A command line of `whiflash learn` that prints JSON."""
    return [WHIFLASH, "learn", str(samples), "--config", CONFIG, "--json", *options]


def learned(samples: Path, url: str, tokens: int) -> dict[str, Any]:
    """A pass of `whiflash learn` over the newest samples, which switches the server."""
    options = ("--url", url, "--tokens", str(tokens), "--replay", str(DATA / "tokens.npz"))
    command = learn(samples, *options)
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return found


def costs(
    asking: Asking, samples: Path, prompts: Sequence[Prompt], turns: int
) -> dict[str, list[dict[str, float]]]:
    """Share of a core → for each turn, output tokens a second alone and beside a learner, and what that really used."""
    found: dict[str, list[dict[str, float]]] = {}
    asking.turn(prompts)  # fills the prefix cache
    for share in SHARES:
        with learner(samples, share) as process:
            time.sleep(LOADED / share)
            for _ in range(turns):
                process.suspend()
                alone = asking.turn(prompts).rate
                process.resume()
                began, used = time.monotonic(), sum(process.cpu_times()[:2])
                beside = asking.turn(prompts).rate
                used = sum(process.cpu_times()[:2]) - used
                turn = {"alone": alone, "beside": beside, "used": used / (time.monotonic() - began)}
                found.setdefault(str(share), []).append(turn)
                print(share, turn, file=sys.stderr, flush=True)
    return found


@contextmanager
def learner(samples: Path, share: float) -> Iterator[psutil.Popen]:
    """A learner at work, with this share of a core. It is killed in the end."""
    command = learn(samples, "--share", str(share), "--judged", "8")
    with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
            if process.poll() is not None:
                raise SystemExit("the learner ended before the turns did: run `whiflash learn` to see why")
        finally:
            process.kill()


def curve(
    asking: Asking, versions: Sequence[int], sides: Mapping[str, Sequence[Prompt]], turns: int
) -> tuple[dict[str, dict[int, list[float]]], dict[int, int]]:
    """Side → version → output tokens a second of each turn, and how many first answers differ from version 0's.

    The versions take turns, behind one of version 0 that fills the prefix cache and is not counted.
    """
    rates: dict[str, dict[int, list[float]]] = {side: {v: [] for v in versions} for side in sides}
    first: dict[int, list[str]] = {}
    order = [[0], *(versions if number % 2 else versions[::-1] for number in range(turns))]
    for number, version in ((number, version) for number, row in enumerate(order) for version in row):
        asking.use(version)
        found = {side: asking.turn(prompts) for side, prompts in sides.items()}
        print(number, version, {side: turn.rate for side, turn in found.items()}, file=sys.stderr, flush=True)
        if number:
            first.setdefault(version, [text for turn in found.values() for text in turn.texts])
            for side, turn in found.items():
                rates[side][version].append(turn.rate)
    others = {v: sum(a != b for a, b in zip(first[v], first[0], strict=True)) for v in versions}
    return rates, others


def walked(
    work: Path, samples: Path, versions: Sequence[int], judges: Sequence[Prompt]
) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Side → drafter → version → what the drafter gained over version 0, alone."""
    config = resolve_config(Path(CONFIG)).model_copy(update={"work": work})
    target = load_target(config.target, config.chat_template, config.capture, config.hardware)
    shape: dict[str, Any] = {
        "vectors": len(target.capture) + 1,
        "hidden": target.hidden_size,
        "layers": target.capture,
    }
    stores = {side: FeatureStore(work / side, **shape) for side in ("away", "home")}
    for store in stores.values():
        store.truncate_to_index()
    rows = [{"id": p.id, "category": p.category, "messages": list(p.messages)} for p in judges]
    data = config.data.model_copy(update={"slots": [Slots(rows=16, capacity=1536)], "max_new_tokens": 160})
    answer_rows(rows, target, data, stores["away"], seed=config.seed)
    rebuild_features(DATA / "unseen.npz", target, stores["home"], drawn(DATA / "unseen.npz", config.seed))
    manifest = load_manifest(embedded_bundle())
    shipped = {arm: member(embedded_bundle(), manifest, PARTS[arm]) for arm in manifest.drafters}
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    before: dict[str, Walked] = {}
    for version in tracked(versions, "versions"):
        paths = read_version(versions_of(samples), version, manifest.target) if version else shipped
        pair = Pair.load(parts_of(manifest, paths, config), target.model)
        for side, store in stores.items():
            walks = walk_answers(pair, store, ReplayLog(work / "rounds" / str(version) / side, pair), Pace())
            for name, gain in gains(before.setdefault(side, walks), walks).items():
                found[side][name][version] = {"after": gain.after, **gain.ratio.model_dump()}
    return found


def report(found: Mapping[str, Any], given: argparse.Namespace, judges: int, home: int) -> None:
    """Print it, and write the page."""
    lines: list[list[str]] = []
    by_version = {0: 0}
    for one in found["passes"]:
        if one["version"]:
            by_version[one["version"]] = by_version[one["present"]] + one["tokens"] // 2
    for version, learned_from in by_version.items():
        row = [f"{learned_from:,} (version {version})"]
        for side in ("away", "home"):
            row += [interval(found["alone"][side][name][version]) for name in ("eagle3", "dflash")]
            rates = found["rates"][side]
            of_turns = [now / then for now, then in zip(rates[version], rates[0], strict=True)]
            row.append(f"{median(of_turns):.3f} ({', '.join(f'{ratio:.2f}' for ratio in of_turns)})")
        lines.append(row)
    heads = (
        "tokens of traffic",
        *(f"{of}, {side}" for side in ("away", "home") for of in ("EAGLE-3", "DSpark", "`auto`")),
    )
    parts = [table(heads, lines)]
    shares = [
        (
            f"{float(share):.0%}",
            f"{median(turn['used'] for turn in of_share):.0%}",
            ", ".join(f"{turn['alone']:.1f}" for turn in of_share),
            ", ".join(f"{turn['beside']:.1f}" for turn in of_share),
            f"{median(turn['beside'] / turn['alone'] for turn in of_share):.2f}",
        )
        for share, of_share in found["cost"].items()
    ]
    parts.append(
        table(("share of a core", "used", "tokens/s alone", "beside the learner", "median ratio"), shares)
    )
    for one in found["passes"]:
        drafters = ", ".join(f"{name} {gain['ratio']:.3f}" for name, gain in one["drafters"].items())
        parts.append(
            f"A pass from version {one['present']} over {one['tokens']:,} tokens, half of them replayed, of "
            f"{one['learned']} requests, judged on {one['judged']} more, took {one['seconds']:.0f} s; "
            f"{one['until_served']:.0f} s from the last sample to served weights: {drafters}; "
            f"version {one['version']}."
        )
    parts.append(
        f"{judges} judging prompts away, {home} at home, {given.turns} turns; drafters were walked alone over "
        f"answers to {judges + WALKED} prompts away."
    )
    print(*parts, sep="\n\n")
    if given.markdown is not None:
        outcome.write(given.markdown, "A server that learns its traffic", *parts)


def interval(gain: Mapping[str, Any]) -> str:
    """Tokens a round, and the ratio with its interval."""
    return f"{gain['after']:.2f}: {gain['ratio']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"


if __name__ == "__main__":
    main()
