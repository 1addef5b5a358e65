"""One archive for a GPU machine without a network: `make gpu-kit`, or `python tests/gpu/kit.py kit.tar.xz`.

Unpacked there, `python3 tests/gpu/run.py --records RECORDS` does what `make gpu` does where SGLang is installed, as far
as the machine's Python goes, and again what is left over. `MACHINE` is what must be there already. The archive brings
this checkout, SGLang's Python, the packages that these need beside, and stand-ins for SGLang's compiled operators.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 60_000_000
"""Bytes of the archive."""
PYTHON = "3.12"
MACHINE = """
torch==2.11.0 triton==3.6.0 torchvision==0.26.0 torchaudio==2.11.0 transformers==5.17.0 hypothesis pytest pytest-timeout
numpy scipy psutil safetensors rich typer httpx aiohttp sentencepiece tiktoken uvloop protobuf prometheus-client pillow
einops requests ninja nvidia-ml-py grpcio
"""
"""Packages of the machine, beside CUDA's compiler; the rehearsal (`test_kit.py`) has nothing more."""
CARRIED = """
annotated-types apache-tvm-ffi compressed-tensors dill distro fastapi gguf llguidance loguru msgspec openai
opentelemetry-api orjson partial-json-parser platformdirs pybase64 pydantic pydantic-core pyzmq setproctitle sniffio
starlette typing-inspection uvicorn xgrammar
"""
"""Packages in the versions that are installed here."""
SOURCES = (
    "kernels",
    "sdk/whiflash_sdk",
    "tests",
    "whiflash_sglang",
    "pyproject.toml",
    "results/benchmark/report.json",
)
LEFT_OUT = ".safetensors"
"""Weights, which nothing uses without the embedded target."""
SGLANG_LEFT_OUT = ("sglang/multimodal_gen/", "sglang/test/", "../")
OPERATORS = ("scalar_type.py", "utils.py")
"""Files of `sgl_kernel` that SGLang reads and that need no operator."""


def tracked() -> list[str]:
    """Files of the checkout that are packed."""
    listed = subprocess.run(
        ["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if not name.endswith(LEFT_OUT)]


def packages(site: Path) -> None:
    """Modules that are imported there and not installed: SGLang's Python, the carried packages, the stand-ins."""
    pinned = [f"{name}=={version(name)}" for name in CARRIED.split()]
    only = ["--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, "--target", str(site)]
    subprocess.run([os.environ.get("UV", "uv"), "pip", "install", "--quiet", *only, *pinned], check=True)
    sglang = distribution("sglang")
    for file in sglang.files or ():
        if not str(file).startswith(SGLANG_LEFT_OUT) and file.suffix not in (".pyc", ".so"):
            into = site / file
            into.parent.mkdir(parents=True, exist_ok=True)
            into.write_bytes(Path(str(sglang.locate_file(file))).read_bytes())
    for stand_in in (ROOT / "tests" / "gpu" / "stand_ins").rglob("*.py"):
        into = site / stand_in.relative_to(ROOT / "tests" / "gpu" / "stand_ins")
        into.parent.mkdir(exist_ok=True)
        into.write_bytes(stand_in.read_bytes())
    spec = find_spec("sgl_kernel")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    for name in OPERATORS:
        operators = Path(next(iter(spec.submodule_search_locations)))
        (site / "sgl_kernel" / name).write_bytes((operators / name).read_bytes())
    plugin = site / f"whiflash_sglang-{version('whiflash-sglang')}.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text(f"Name: whiflash-sglang\nVersion: {version('whiflash-sglang')}\n")
    groups = ("sglang.srt.plugins", "sglang.srt.platforms")
    ours = {
        group: [e for e in entry_points(group=group) if e.value.startswith("whiflash")] for group in groups
    }
    sections = (f"[{group}]\n" + "".join(f"{e.name} = {e.value}\n" for e in ours[group]) for group in groups)
    (plugin / "entry_points.txt").write_text("\n".join(sections))


def build(archive: Path) -> int:
    """Write the archive. Returns its bytes. Raises AssertionError if they are more than `MOST`."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz", preset=6) as packed:
        packages(Path(scratch))

        # Builder, time and place of building, and the origins of packages are left out.
        def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            left_out = info.name.endswith((".pyc", "direct_url.json", "/INSTALLER", "/REQUESTED", ".lock"))
            return None if left_out or info.name == "site/bin" else info

        packed.add(scratch, "site", filter=anonymous)
        for name in tracked():
            packed.add(ROOT / name, name, filter=anonymous)
    size = archive.stat().st_size
    assert size <= MOST, f"{size} bytes are more than {MOST}"
    return size


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]))} bytes")
