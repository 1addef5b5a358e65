"""Tokens a second beside SGLang's own arms: `python tests/gpu/speed.py --concurrency 8 --out report.json`.

`whiflash bench` in one run of at most ten minutes, all servers up at once, each with SGLang's own choice of attention
and with graphs: plain decoding, EAGLE3, DFLASH or DSPARK, and `auto`. Exit status and report are the benchmark's.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from served import Served

OVER = "EAGLE3"
SHARED = "--max-total-tokens 65536 --mem-fraction-static 0.5"
"""Four servers share one card: each may fill half of what those before it left, and takes KV for 64 requests."""
CARD = ("--minutes", "7", "--repetitions", "8", "--per-category", "6", "--server-args", SHARED)
REHEARSAL = ("--minutes", "4", "--repetitions", "1", "--max-tokens", "8")
PROMPTS = ("Say something.", "And now?", "A third one.")


def command(served: Served, concurrency: int, out: Path, scale: Sequence[str]) -> list[str]:
    """Arguments of `whiflash`."""
    pair = ["--model-path", str(served.target), "--bundle", str(served.bundle), "--dtype", served.dtype]
    arms = ["--arms", ",".join(arms_of(served)), "--over", OVER, "--concurrency", str(concurrency)]
    return ["bench", *pair, *arms, *scale, "--out", str(out), "--log-dir", str(out.with_suffix(".logs"))]


def arms_of(served: Served) -> list[str]:
    """Plain decoding, upstream's arms of the pair's drafters, and `auto`."""
    from whiflash_lab.bench.arms import block_arm
    from whiflash_sglang.checkpoints.manifest import load_manifest
    from whiflash_sglang.formats.table import read_draft

    block = read_draft(served.bundle / str(load_manifest(served.bundle).dflash)).format
    return ["none", "EAGLE3", block_arm(block, on_cpu=False), "auto"]


def short_prompts(path: Path) -> Path:
    """A file of prompts that tiny models have room for."""
    rows = ({"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(PROMPTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    from whiflash_sglang.cli.app import main as whiflash

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model-path")
    parser.add_argument("--bundle")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    rehearse = chosen.device == "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        served = Served.find(chosen.model_path, chosen.bundle, Path(scratch), rehearse=rehearse)
        print(f"{served.name} on {chosen.device}", flush=True)
        scale = CARD
        if rehearse:
            scale = (*REHEARSAL, "--prompts", str(short_prompts(Path(scratch) / "prompts.jsonl")))
        sys.argv = ["whiflash", *command(served, chosen.concurrency, chosen.out, scale)]
        whiflash()


if __name__ == "__main__":
    main()
