"""Provenance of a result: command, revision, versions, machine."""

import os
import time

import torch

from whiflash_sglang.files.provenance import busy, made_by


def provenance() -> dict[str, str]:
    """Return the facts that are stored with every result."""
    made = made_by(("torch", "triton"))
    return {
        "command": " ".join(["python", "kernels/bench/" + made["command"][0], *made["command"][1:]]),
        "revision": made["revision"] + " with local changes" * made["uncommitted_changes"],
        **made["packages"],
        "cuda": torch.version.cuda or "none",
        "python": made["python"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": f"{made['hardware']['cpu']}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "load": f"{busy()['load_1min']:.1f} (one-minute average at the start)",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
