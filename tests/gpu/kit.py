"""One archive for a GPU machine without a network: `make gpu-kit`, or `python tests/gpu/kit.py kit.tar.xz`.

A machine may take the checkout and the archive up to `TREE` bytes together: more than that is an error.

Unpacked there, `python3 tests/gpu/run.py --records RECORDS` does what `make gpu` does where SGLang is installed, as far
as the machine's Python goes, and again what is left over. `MACHINE` is what must be there already. The archive brings
this checkout, SGLang's Python, the packages that these need beside, and stand-ins for SGLang's compiled operators.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = 64 << 20
"""Bytes of the checkout that travels and of the archive, together."""
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
    "cpu/whiflash_cpu",
    "kernels",
    "lab/whiflash_lab",
    "sdk/whiflash_sdk",
    "tests",
    "train/whiflash_train",
    "whiflash_sglang",
    "pyproject.toml",
    "results/benchmark/report.json",
)
LEFT_OUT = ".safetensors"
"""Weights, which nothing uses without the embedded target."""
SGLANG_LEFT_OUT = ("sglang/multimodal_gen/", "sglang/test/", "../")
FLASHINFER = ("sampling.cu", "renorm.cu", "flashinfer_sampling_binding.cu")
SAMPLER = "flashinfer_sampling.so"
"""FlashInfer's sampling operators for sm_90a; SGLang's default sampler on a card calls them (`sampler.py`)."""
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
    groups = (
        *("sglang.srt.plugins", "sglang.srt.platforms"),
        *("whiflash.checks", "whiflash.commands", "whiflash.names"),
    )
    ours = {
        group: [e for e in entry_points(group=group) if e.value.startswith("whiflash")] for group in groups
    }
    sections = (f"[{group}]\n" + "".join(f"{e.name} = {e.value}\n" for e in ours[group]) for group in groups)
    (plugin / "entry_points.txt").write_text("\n".join(sections))


def compile_sampler(into: Path) -> None:
    """Compile FlashInfer's sampling operators, which takes two minutes. Without `nvcc` there are none in the kit.

    `curand.h` is the one header that a compiler's package may lack; NVIDIA's other headers must be the compiler's.
    """
    flashinfer, tvm = (Path(find_spec(name).origin).parent for name in ("flashinfer", "tvm_ffi"))  # type: ignore
    if not (nvcc := shutil.which("nvcc")):
        print("no nvcc: the kit has no FlashInfer, and its part is left out", file=sys.stderr)
        return
    sources = [flashinfer / "data" / "csrc" / name for name in FLASHINFER]
    with tempfile.TemporaryDirectory() as headers:
        for header in flashinfer.parent.glob("nvidia/cu*/include/curand*.h"):
            shutil.copy(header, headers)
        include = (flashinfer / "data" / "include", sources[0].parent, tvm / "include", Path(headers))
        flags = ["-shared", "-O2", "-std=c++17", "-Xcompiler", "-fPIC", "-w", "--expt-relaxed-constexpr"]
        flags += [
            "-gencode=arch=compute_90a,code=sm_90a",
            "-DFLASHINFER_ENABLE_BF16",
            "-DFLASHINFER_ENABLE_F16",
        ]
        places = [f"-I{path}" for path in include]
        subprocess.run([nvcc, *flags, *places, *map(str, sources), "-o", str(into)], check=True)


def travels() -> int:
    """Bytes of the checkout as it is: tracked files, and others that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in set(names.split("\0")) if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_size(kit: int, tree: int) -> None:
    """Raises SystemExit if both together are more than a machine may take."""
    if kit + tree > TREE:
        raise SystemExit(
            f"the checkout ({tree:,} bytes) and the kit ({kit:,}) are {kit + tree:,} bytes, more than {TREE:,}: a "
            "machine may refuse them. Take the bundles' weights out, which the kit does not need: "
            "rm whiflash_sglang/bundles/*/*/model.safetensors; git checkout whiflash_sglang/bundles brings them back"
        )


def build(archive: Path) -> int:
    """Write the archive. Returns its bytes."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz", preset=6) as packed:
        packages(Path(scratch))
        compile_sampler(Path(scratch) / SAMPLER)

        # Builder, time and place of building, and the origins of packages are left out.
        def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            left_out = info.name.endswith((".pyc", "direct_url.json", "/INSTALLER", "/REQUESTED", ".lock"))
            return None if left_out or info.name == "site/bin" else info

        packed.add(scratch, "site", filter=anonymous)
        for name in tracked():
            packed.add(ROOT / name, name, filter=anonymous)
    return archive.stat().st_size


if __name__ == "__main__":
    size, tree = build(Path(sys.argv[1])), travels()
    print(f"{sys.argv[1]}: {size:,} bytes; the checkout: {tree:,}")
    check_size(size, tree)
