"""AIPerf against a plain server and one of WHIFLASH, both on the embedded model: `python scripts/aiperf.py`.

Both are sent the same requests, one server after the other: held-out prompts of the benchmark, and recorded
conversations where `--recorded` names files. AIPerf counts by what servers stream; nothing here corrects it. It comes
from PyPI into an environment of its own (`uv tool run`), since it pins other versions than SGLang does.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import outcome
from servers_beside import arguments_of

from whiflash_sglang.lab.bench.prompts import load_prompts, sample
from whiflash_sglang.lab.recorded.conversation import dag_lines
from whiflash_sglang.lab.recorded.files import read_recorded
from whiflash_sglang.serving import Server, ServerHost

VERSION = "0.13.0"
UV = shutil.which("uv") or str(Path(__file__).parents[1] / ".uv" / "bin" / "uv")
COLUMNS = {
    "request_count": "requests",
    "request_throughput": "requests/s",
    "output_token_throughput": "output tokens/s",
    "output_sequence_length": "output tokens a request",
    "time_to_first_token": "TTFT ms",
    "inter_token_latency": "ITL ms",
    "request_latency": "latency ms",
}
"""AIPerf's names of figures, and ours. Its mean is taken of each."""


def asked(prompts: Path, per_category: int) -> Iterator[str]:
    """Held-out prompts, so many of each category, as conversations of one turn."""
    for prompt in sample(load_prompts(str(prompts)), per_category):
        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        yield json.dumps({"session_id": prompt.id, "turns": [{"messages": list(prompt.messages), **tools}]})


def measured(
    command: Sequence[str], server: Server, model: str, lines: Sequence[str], args: Any
) -> dict[str, Any]:
    """What AIPerf exports of a run over these conversations. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dag.jsonl")
        source.write_text("\n".join(lines) + "\n")
        subprocess.run(
            [
                *(*command, "profile", "--url", server.base_url, "--model", "embedded", "--tokenizer", model),
                *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
                *("--input-file", str(source), "--custom-dataset-type", "dag_jsonl"),
                *("--concurrency", str(args.concurrency), "--conversation-num", str(len(lines))),
                *("--extra-inputs", f"max_tokens:{args.max_tokens}", "--extra-inputs", "temperature:0"),
                *("--output-artifact-dir", folder, "--ui", "none"),
            ],
            check=True,
            stdout=sys.stderr,
        )
        return dict(json.loads(next(Path(folder).rglob("profile_export_aiperf.json")).read_text()))


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """A row for each set and server."""
    rows = [f"| set | server | {' | '.join(COLUMNS.values())} |", "| --- | --- |" + " ---: |" * len(COLUMNS)]
    for (name, server), figures in found.items():
        cells = [_number(figures[key]["avg"]) if key in figures else "" for key in COLUMNS]
        rows.append(f"| {name} | {server} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aiperf", nargs="+", default=[UV, "tool", "run", f"aiperf@{VERSION}"])
    parser.add_argument("--prompts", type=Path, default=Path("results/benchmark/held-out.jsonl"))
    parser.add_argument(
        "--recorded", type=Path, nargs="*", default=[], help="recorded conversations, replayed"
    )
    parser.add_argument("--per-category", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("results/aiperf.json"))
    parser.add_argument("--markdown", type=Path, default=Path("results/aiperf.md"))
    args = parser.parse_args()
    sets = {"held-out prompts": list(asked(args.prompts, args.per_category))}
    if args.recorded:
        sets["recorded"] = list(dag_lines(talk for file in args.recorded for talk in read_recorded(file)))
    model, both, ours = arguments_of(False, Path())
    auto = [*ours[:2], *ours[4:]]  # without the script's policy
    both += ["--served-model-name", "embedded", "--dtype", "bfloat16"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with ServerHost() as host:
        for name, more in (("plain", []), ("WHIFLASH", auto)):
            with Server(["--model-path", model, *both, *more], host=host) as server:
                for title, lines in sets.items():
                    print(f"{name}: {title}, {len(lines)} conversations …", file=sys.stderr, flush=True)
                    found[title, name] = measured(args.aiperf, server, model, lines, args)
    args.json.write_text(json.dumps({f"{s}, {n}": f for (s, n), f in found.items()}, indent=1) + "\n")
    outcome.write(
        args.markdown,
        "AIPerf against both servers",
        f"AIPerf {VERSION}, concurrency {args.concurrency}, greedy, at most {args.max_tokens} tokens an answer; means "
        "as AIPerf exports them. Servers ran one after the other, on the CPU backend of this package.",
        table(dict(sorted(found.items()))),
    )


if __name__ == "__main__":
    main()
