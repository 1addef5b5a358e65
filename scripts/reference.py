"""Tables of the documentation that come from code, written between their marks: `python scripts/reference.py`.

A page holds `<!-- NAME: written by make docs -->` and `<!-- end of NAME -->`; the text between them is NAME's
table. Nothing here imports SGLang; only the table of draft formats imports torch.
"""

import json
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from target_families import FAMILIES, Shown
from whiflash_sdk.capabilities import Capabilities
from whiflash_sdk.hints import Hints, Span
from whiflash_sdk.trace import Stretch, Trace

from whiflash_lab.advise import cards_for
from whiflash_lab.published import KNOWN
from whiflash_sglang.checkpoints.manifest import (
    EntropyRouter,
    Lookup,
    Manifest,
    NeuralRouter,
    Source,
    Structure,
    embedded_bundle,
)
from whiflash_sglang.cli.app import app
from whiflash_sglang.engine.names import PRIVATE_NAMES
from whiflash_sglang.engine.patches import replaced
from whiflash_sglang.files.jsonl import read_json_file
from whiflash_sglang.files.provenance import environment
from whiflash_sglang.prices.round_clock import RoundClock
from whiflash_sglang.serve.metrics import SERIES
from whiflash_sglang.settings.config import PolicyChange, RouterName
from whiflash_sglang.settings.flags import flags
from whiflash_sglang.telemetry.tally import Tally

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MARKED = re.compile(r"(<!-- (\w+): written by `make docs` -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

STAGES = ("route", "catch_up", "draft", "verify", "commit", "park")
STATE = {
    "policy": "the policy in force",
    "arms": "loaded drafters",
    "requests": "running requests",
    "quarantined": "arms that are left out for everybody, with the reason",
    "left_out": "requests that continued without an arm, by arm",
    "faulty_drafts": "rounds of requests in which an arm returned invalid drafts, by arm",
    "rounds": "rounds of the batch",
    "rows": "verified rows",
    "tokens": "committed by rounds, including bonus tokens",
    "switches": "rounds of requests drafted by another arm than the round before",
    "extra_catch_up_seconds": "seconds of catching up that would not arise if one drafter drafted every round",
    "round_seconds": "all stages, with gaps",
    **dict.fromkeys((f"{stage}_seconds" for stage in STAGES), "a stage of the round"),
    "by_arm": "by arm and `none`: `rounds` of requests, `tokens`, drafts `proposed` and `accepted`; another arm "
    "appended `joined` of the proposed drafts, `joined_accepted` of the accepted ones",
    "cached": "prompt tokens of ended requests whose KV was kept, by place: `device`, `host` or `storage`",
    "loaded": "as `by_arm`, of ended requests whose prompt's KV came in part from the host or from storage",
    "reasons": "rounds of requests by routing reason",
    "hints": "requests by the origin of their hints",
    "previews": "`prefilled` at least in part and `dropped` before, and their prefilled `tokens`",
    "timed_seconds": "consecutive rounds and the time between them",
    "timed_tokens": "committed by these rounds",
    "priced_seconds": "of `timed_seconds`, those of rounds for which plain decoding's price was known",
    "priced_tokens": "committed by these rounds",
    "plain_seconds": "estimate of plain decoding's seconds for these tokens, by `costs`; over `priced_seconds`, "
    "the gain",
    "plain_price": "how far plain decoding's price is known: `rounds` that were timed, and those that are `needed`",
    "costs": "prices of routes in seconds, as in `sglang:whiflash_cost_seconds`, by `work` and arm",
    "memory": "bytes by scope, as in `sglang:whiflash_memory_bytes`",
    "samples": "with `--whiflash-learn`: finished requests by outcome, `bytes` on disk, whether writing is `failing`",
}
"""Meanings in `GET /whiflash/state`, but for what arms add of their own."""


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def listed(rows: Iterable[tuple[str, str]]) -> str:
    """Return a Markdown list of names and their meanings: on a phone it wraps, where a table would scroll."""
    return "\n".join(f"- {names}: {meaning}" for names, meaning in rows)


def flags_list() -> str:
    return listed((f"`{name}` {_choices(takes)}", meaning) for name, takes, meaning in flags())


def fields(model: type[BaseModel], beyond: type[BaseModel] = BaseModel) -> str:
    """Return a list of a model's fields without those of `beyond`: type, default and meaning in its docstring.

    Raises:
        KeyError: the docstring does not say what a field means.
    """
    meaning = meanings(model)
    said = [
        (f"`{field}`", _type(info.annotation) + _default(info), meaning[field])
        for field, info in model.model_fields.items()
        if field not in beyond.model_fields
    ]
    return listed(
        (", ".join(row[0] for row in rows) + _of_text(takes), what)
        for (takes, what), rows in groupby(said, itemgetter(slice(1, 3)))
    )


def _of_text(takes: str) -> str:
    """Return a field's type and default in brackets; empty for a text without a default."""
    shown = {"text": "", "text, required": "required"}.get(takes, takes)
    return f" ({shown})" if shown else ""


def meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """Return each field's meaning in a model's docstring, by `name: meaning.` or `name, other: meaning.` there."""
    names = "|".join(model.model_fields)
    said = {}
    for one in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        text = " ".join((one.__doc__ or "").partition("Raises:")[0].replace("Attributes:", "").split())
        found = list(re.finditer(rf"(?:^|(?<=[.;…] ))((?:{names})(?:, (?:{names}))*): ", text))
        ends = [*(match.start() for match in found[1:]), len(text)]
        for match, end in zip(found, ends, strict=False):
            for name in match[1].split(", "):
                said[name] = text[match.end() : end].strip(" .;")
    return said


def training_keys() -> str:
    """Return a list of keys for each section of a training configuration."""
    from whiflash_train import config

    none = BaseModel
    sections = (
        ("The file", config.TrainConfig, none),
        ("hardware", config.Hardware, none),
        ("data", config.Data, none),
        ("draft_layers", config.DraftLayers, none),
        ("eagle3", config.Eagle3, none),
        ("dflash and dspark", config.DFlash, none),
        ("dspark only", config.DSpark, config.DFlash),
        ("loop, of each drafter", config.Loop, none),
    )
    return "\n\n".join(f"### {name}\n\n{fields(model, beyond)}" for name, model, beyond in sections)


def formats_table() -> str:
    """Return a table of draft formats, each with the entries of `config.json` by which it is recognised."""
    from whiflash_sglang.formats.table import FORMATS

    rows = (
        (one.name, f"`{one.arm}`", ", ".join(f"`{key}`" for key in one.keys), one.published, one.defined_by)
        for one in FORMATS
    )
    return table(("format", "arm", "`config.json`", "published by", "compared with"), rows)


def targets_table() -> str:
    """Return a table of families of targets, each with its status: tested, untested or refused."""
    rows = (
        (", ".join(f"`{name}`" for name in one.architectures), one.kind, "; ".join(filter(None, (one.shown, one.note))))
        for one in sorted(FAMILIES, key=lambda one: [*Shown].index(one.shown))
    )
    return table(("`architectures`", "layers", "status"), rows)


def state_list() -> str:
    """Return a list of the keys of `GET /whiflash/state`. Raises KeyError for a key without a meaning in `STATE`."""
    known = (
        *("policy", "arms", "requests", "quarantined", "left_out", "faulty_drafts"),
        *RoundClock().snapshot(),
        *Tally.of(()).snapshot(),
        "plain_price",
        "costs",
        "memory",
        "samples",
    )
    found = ((", ".join(f"`{name}`" for name in names), what) for what, names in groupby(known, STATE.__getitem__))
    return listed(found)


def metrics_list() -> str:
    """Return a list of the series that we add to `/metrics`."""
    return listed(
        (f"`{one.full_name}` ({', '.join((one.kind, *(f'`{label}`' for label in one.labels)))})", one.meaning)
        for one in SERIES
    )


LAB = "whiflash lab "
MANY = 11  # options of a command that its help lists better than a page


def cli_reference() -> str:
    """Return the options that several commands share, then each command's help, arguments and options."""
    daily = {name: command for name, command in commands().items() if not name.startswith(LAB)}
    known = {name: [_option(option) for option in _shown(command)] for name, command in daily.items()}
    counted = Counter(row for rows in known.values() for row in rows)
    shared = {row for row, count in counted.items() if count > 1}
    first = f"In several commands:\n\n{listed(row for row in counted if row in shared)}"
    rare = [(f"`{name}`", _sentence(command)) for name, command in commands().items() if name.startswith(LAB)]
    rest = f"## whiflash lab\n\nCommands that few need; `-h` after one shows its options.\n\n{listed(rare)}"
    return "\n\n".join([first, *(_command(name, daily[name], known[name], shared) for name in known), rest])


def _sentence(command: Any) -> str:
    return " ".join((command.help or "").split("\n\n")[0].split())


def _shown(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]


def commands() -> Mapping[str, Any]:
    """Return each command by the words that call it, in the order of the help."""
    found = {}

    def walk(words: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(f"{words} {name}", inner)
        else:
            found[words] = command

    walk("whiflash", typer.main.get_command(app))
    return found


def _command(name: str, command: Any, options: list[tuple[str, str]], shared: set[tuple[str, str]]) -> str:
    text, _, example = (command.help or "").replace("\b", "").partition("Example")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    calls = [call.strip() for call in re.sub(r"^s?:", "", example).split("\n")]
    parts = [f"## {name}", *paragraphs[:1]]
    if any(calls):
        parts.append("```console\n" + "\n".join(filter(None, calls)) + "\n```")
    own = [row for row in options if row not in shared]
    if len(own) > MANY:
        parts.append(f"{len(own)} options: `{name} -h`.")
    elif own:
        parts.append(listed(own))
    also = [re.match(r"`[\w-]+", option)[0] + "`" for option, _ in options if (option, _) in shared]
    if also := [option for option in also if option != "`--json`"]:
        parts.append(f"Also: {', '.join(also)}.")
    return "\n\n".join(parts)


def _option(parameter: Any) -> tuple[str, str]:
    is_option = parameter.opts[0].startswith("-")
    names = [*parameter.opts] if is_option else [parameter.name.upper()]
    choices = ""
    if getattr(parameter, "is_bool_flag", False):
        if parameter.secondary_opts and parameter.default is not False:
            names += parameter.secondary_opts
    else:
        takes = _type_word(parameter.type_descriptor.annotation)
        if takes == "|".join(get_args(RouterName)):
            choices = " [Policies](flags.md)."
        elif "|" in takes:
            choices = f" {_choices(takes)}."
        elif takes.endswith("…"):
            names[-1] += " …"
    default = parameter.default
    shown = "" if default in (None, False, True, "", ...) or not is_option else f" Default: `{default}`."
    needed = " Required." if is_option and parameter.required else ""
    return ", ".join(f"`{name}`" for name in names), f"{parameter.help or ''}{choices}{shown}{needed}"


def _choices(takes: str) -> str:
    return ", ".join(f"`{part}`" for part in takes.split("|"))


def _type_word(annotation: Any) -> str:
    words: Mapping[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and parts:
        return _type_word(parts[0])
    if get_origin(annotation) is Literal:
        return "|".join(parts)
    if get_origin(annotation) is list:
        return f"{_type_word(parts[0])} …"
    return words[annotation]


def _type(annotation: Any) -> str:
    """Return a field's type in JSON's words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin is Annotated:
        return _type(inside[0])
    if origin in (Union, UnionType):
        return ", ".join(dict.fromkeys(_type(part) for part in inside if part is not NoneType))
    if origin is tuple:
        return f"list of {_type(inside[0])}" if inside[1:] == (...,) else f"{len(inside)} × {_type(inside[0])}"
    if origin in (Sequence, list):
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"object: {_type(inside[0])} → {_type(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    words: Mapping[Any, str] = {int: "integer", float: "number", str: "text", bool: "boolean", Path: "path"}
    return "any" if annotation is Any else words[annotation]


def _default(info: Any) -> str:
    """Return the text after a field's type: that a value is required, or a default worth showing; else empty."""
    if info.is_required():
        return ", required"
    value = info.default if info.default is not PydanticUndefined else info.default_factory()
    if isinstance(value, (BaseModel, list)) or value in (None, "", (), {}):
        return ""
    if isinstance(value, tuple):
        return " = " + ", ".join(f"`{one}`" for one in value)
    return f" = `{str(value).lower() if isinstance(value, bool) else value}`"


def gpu_list(records: Path = ROOT / "results" / "gpu") -> str:
    """Return a list of the parts of `make gpu`, each with the result of its last run if it has run."""
    parts = runpy.run_path(str(ROOT / "tests" / "gpu" / "run.py"))["PARTS"]
    results = {part.name: _measured(records / f"{part.name}.json") for part in parts}
    ran = f"{len([one for one in results.values() if one])} of {len(parts)} parts have run on a card."
    return f"{ran}\n\n" + listed((f"`{part.name}`", f"{part.shows}{results[part.name]}") for part in parts)


def patches_list() -> str:
    """Return a list of SGLang's names that are replaced."""
    rows = [f"- {sentence}" for *_, sentence in replaced()]
    counts = f"{len(rows)} names are replaced, {len(PRIVATE_NAMES)} members and signatures more are used."
    return "\n".join([counts, "", *rows])


def _measured(record: Path) -> str:
    """Return the result of a part of `make gpu`, its machine and each of its checks; empty if it has not run."""
    if not record.exists():
        return ""
    found = json.loads(record.read_text("utf-8"))
    checks = ((found.get("figures") or {}).get("checks") or {}).items()
    told = found.get("why") or ", ".join(f"{name} {check['status']}" for name, check in checks)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return f". **{found['status']}**{f' ({told})' if told else ''}; {found['machine']}; {versions}"


BENCHMARK = ROOT / "results" / "benchmark"
HOME = {"report": "greedy", "sampled": "temperature 0.6", "tools": "forced tool calls, temperature 0.6"}
"""Reports on prompts of our own, and what was asked."""

AWAY = {"suites": "Spec-Bench and nine other sets", "ifeval": "IFEval", "bfcl": "BFCL", "swe-agent": "SWE-agent"}
"""Reports on prompts of others."""

SPECIAL = {
    "structure": ("strict tools and JSON schemas", "auto"),
    "no-drafters": ("no draft checkpoint", "auto-no-drafters"),
    "losing": ("drafters that are never right", "auto-bad-drafters"),
}
"""Reports on one thing: what was asked, and the arm that answered."""


LOADS = (1, 4, 8)
"""Requests at a time."""


def _kept(name: str) -> Any:
    return read_json_file(BENCHMARK / f"{name}.json")


def _ratio(found: Mapping[str, float]) -> str:
    """Return a ratio with its interval, if it was measured more than once."""
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] != found["high"] else ""
    return f"{found['ratio']:.2f}{interval}"


def _by_load(report: Any, arm: str, over: str) -> dict[int, str]:
    """Return load → text with the rate of `arm` over that of `over`, for all prompts but loops."""
    ratios = {int(at["load"]["value"]): at["ratios"].get(arm, {}).get(over, {}) for at in report["loads"]}
    return {load: _ratio(of["overall"]) for load, of in ratios.items() if "overall" in of}


ARMS = ("auto", "EAGLE3", "diffusion")
"""Arms of a report that the table of speed compares: ours, and the drafters alone, SGLang's EAGLE3 and our DSpark."""


def speed_table() -> str:
    """Return a table of the rate of `auto` over plain's by prompts and load, the better drafter's in brackets."""
    rows, conditions, shipped = [], [], environment(embedded_bundle())["bundle_sha256"]
    made: dict[str, None] = {}
    for name, asked in HOME.items():
        report = _kept(name)
        made[report["provenance"]["revision"][:8]] = None
        auto, *singles = ({load: shown[:4] for load, shown in _by_load(report, arm, "none").items()} for arm in ARMS)
        rows.append((asked, *(f"**{auto[load]}** ({max(one[load] for one in singles)})" for load in LOADS)))
        pair = "" if report["provenance"]["bundle_sha256"] == shipped else ", an earlier pair"
        conditions.append(f"{report['arms']['none']['overall']['answers']} {asked}{pair}")
    hardware = report["provenance"]["hardware"]
    caption = (
        f"SmolLM2-135M-Instruct in {report['provenance']['dtype']} on {hardware['cores']} cores of {hardware['cpu']}, "
        f"one repetition, revision {' and '.join(made)}. Prompts: {', '.join(conditions)}."
    )
    return f"{table(('prompts', '1 request', *(f'{load} requests' for load in LOADS[1:])), iter(rows))}\n\n{caption}"


def figures_table() -> str:
    """Return a table with a row for each report of speed: prompts, ratios by load, minutes."""
    asked = {name: (f"ours, {how}", "auto") for name, how in HOME.items()}
    asked |= {name: (called, "auto") for name, called in AWAY.items()} | SPECIAL
    rows = []
    for name, (prompts, arm) in asked.items():
        report = _kept(name)
        plain, single = (_by_load(report, arm, over) for over in ("none", "static"))
        row = (
            f"[{prompts}](benchmark/{name}.md)",
            str(report["arms"]["none"]["overall"]["answers"]),
            *(plain.get(load, "") for load in LOADS),
            " / ".join(single.values()),
            f"{report['provenance']['seconds'] / 60:.0f}",
            report["provenance"]["revision"][:8],
        )
        rows.append(row)
    header = ("prompts", "answers", "over plain decoding at 1", "4", "8", "over the better single drafter at 1 / 4 / 8")
    return table((*header, "minutes", "revision"), iter(rows))


def categories_table() -> str:
    """Return a table of the gains of `auto` at one request, by category of the main report and for other reports."""
    main = _kept("report")
    both = main["ratios"]["auto"]["none"].keys() & main["ratios"]["auto"]["static"].keys()
    names = sorted(main["categories"].keys() & both - {"loops"})  # which flatter every drafter
    groups = [(main, name, name.replace("_", " ")) for name in names]
    groups += [(_kept(name), "overall", called) for name, called in AWAY.items()]
    rows = []
    for report, group, called in groups:
        ratios = (report["ratios"]["auto"][over][group] for over in ("none", "static"))
        rows.append((called, str(report["arms"]["none"][group]["answers"]), *map(_ratio, ratios)))
    return table(("prompts", "number", "over plain decoding", "over the better single drafter"), iter(rows))


def card_table() -> str:
    """Return a table of tokens per second of random models in an 8B shape, by number of concurrent requests."""
    record = read_json_file(ROOT / "results" / "gpu" / "shaped.json")
    checks, rates = record["figures"]["checks"], "tokens_per_s_at_{}_of_1024"
    loads = [load for load in map(str, range(1, 100)) if rates.format(load) in checks["none"]]
    arms = [arm for arm in ("none", "plain", "DFLASH", "DFLASH-4", "ar", "diffusion", "auto") if arm in checks]
    rows = ((arm, *(f"{checks[arm][rates.format(load)]:,.0f}" for load in loads)) for arm in arms)
    return table((f"tokens a second, {record['machine'].partition(',')[0]}", *loads), rows)


def published_blocks() -> str:
    """A block of commands for each target for which others published drafters, by size."""
    parts = []
    for one in sorted(KNOWN, key=lambda one: one.shape.parameters):
        drafters = (("--eagle3", one.eagle3), ("--dflash", one.block))
        pair = " ".join(f"{flag} {names[0]}" for flag, names in drafters if names)
        more = [name for _, names in drafters for name in names[1:]]
        bundle = one.name.rpartition("/")[2].lower()
        spread = f"--tp-size {cards}" if (cards := cards_for(one, "h100")) > 1 else ""
        served = " ".join(filter(None, (f"--speculative-draft-model-path {bundle}", spread, one.parsers)))
        lines = f"whiflash bundle create --target {one.name} {pair} --out {bundle}\nwhiflash serve {one.name} {served}"
        block = f"### {bundle}\n\n{one.shape.parameters / 1e9:.3g} B parameters.\n\n```console\n{lines}\n```"
        parts.append(block + (f"\n\nOther drafters: {', '.join(f'`{name}`' for name in more)}." if more else ""))
    return "\n\n".join(parts)


TABLES: Mapping[str, Callable[[], str]] = {
    "flags": flags_list,
    "manifest": lambda: fields(Manifest),
    "manifest_router": lambda: fields(NeuralRouter),
    "manifest_entropy": lambda: fields(EntropyRouter),
    "manifest_lookup": lambda: fields(Lookup),
    "manifest_structure": lambda: fields(Structure),
    "manifest_source": lambda: fields(Source),
    "formats": formats_table,
    "targets": targets_table,
    "policy": lambda: fields(PolicyChange),
    "state": state_list,
    "metrics": metrics_list,
    "capabilities": lambda: fields(Capabilities),
    "hints": lambda: fields(Hints),
    "span": lambda: fields(Span),
    "trace": lambda: fields(Trace),
    "stretch": lambda: fields(Stretch),
    "commands": cli_reference,
    "training": training_keys,
    "gpu": gpu_list,
    "patches": patches_list,
    "published": published_blocks,
    "speed": speed_table,
    "figures": figures_table,
    "categories": categories_table,
    "card": card_table,
}


def written(page: str) -> str:
    """Return `page` with each marked table rewritten. Raises KeyError for a mark that names no table."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def pages() -> Iterator[Path]:
    """Yield the pages that have marks of tables."""
    yield from (
        path
        for path in (ROOT / "README.md", ROOT / "results" / "README.md", *sorted(DOCS.rglob("*.md")))
        if MARKED.search(path.read_text("utf-8"))
    )


if __name__ == "__main__":
    for path in pages():
        before = path.read_text("utf-8")
        if (after := written(before)) != before:
            path.write_text(after, "utf-8")
            print(f"{path.relative_to(DOCS.parent)}: written", file=sys.stderr)
