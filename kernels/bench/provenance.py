"""Provenance of a result: command, revision, versions, machine."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton


def provenance() -> dict[str, str]:
    """Return the facts that are stored with every result."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    revision = git("rev-parse", "HEAD") or "unknown (no git checkout)"
    changed = git("status", "--porcelain", "--", str(here.parent / "whiflash_kernels"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": " ".join(["python", f"kernels/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "revision": revision + (" with local changes to the kernels" if changed else ""),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "gpu": device,
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "load": f"{os.getloadavg()[0]:.1f} (one-minute average at the start)",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    """Return the processor's model name."""
    information = Path("/proc/cpuinfo")
    names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()
