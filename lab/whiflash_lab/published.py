"""Targets that have drafters, and what others published of them. Facts with their sources; nothing here was measured.

Lengths are tokens of a round with the bonus token. They are of the checkpoints that the source names, which may be
others than those that are listed.
"""

from collections.abc import Mapping
from typing import NamedTuple

from whiflash_sglang.drafts import arms

AR, BLOCK = arms.AR, arms.DIFFUSION
SETS = ("GSM8K", "MATH", "HumanEval", "LCB", "MT-Bench")


class Acceptance(NamedTuple):
    """lengths: data set → arm → tokens a round. drafts: arm → drafts of a round at which lengths were published."""

    lengths: Mapping[str, Mapping[str, float]]
    drafts: Mapping[str, int]
    source: str


class Ratio(NamedTuple):
    """Tokens a second over plain decoding, by requests, as published. what: the method, engine, device and data."""

    what: str
    by_requests: Mapping[int, str]


class Shape(NamedTuple):
    """parameters, active: of all experts, and of those that a token uses. layers. kv: bytes of a token of context.
    experts, used: of a layer, 0 in a dense model. expert_bytes: of a parameter of an expert.
    """

    parameters: float
    active: float
    layers: int
    kv: int
    experts: int = 0
    used: int = 0
    expert_bytes: float = 2.0


class PublishedTarget(NamedTuple):
    """A target. eagle3, block: its drafters, hub ids, first those that `acceptance` is of. ratios: of others."""

    name: str
    shape: Shape
    eagle3: tuple[str, ...]
    block: tuple[str, ...]
    acceptance: Acceptance | None = None
    ratios: tuple[Ratio, ...] = ()
    parsers: str = ""


def _deepspec(ar: tuple[float, ...], block: tuple[float, ...]) -> Acceptance:
    lengths = {name: {AR: chain, BLOCK: other} for name, chain, other in zip(SETS, ar, block, strict=True)}
    source = (
        "DeepSeek's EAGLE-3 and DSpark, chains and blocks of 7, temperature 1 (arXiv 2607.05147, table 1)"
    )
    return Acceptance(lengths, {AR: 7, BLOCK: 7}, source)


KNOWN = (
    PublishedTarget(
        "Qwen/Qwen3-4B",
        Shape(4.0e9, 4.0e9, 36, 147456),
        ("deepseek-ai/eagle3_qwen3_4b_ttt7", "AngelSlim/Qwen3-4B_eagle3"),
        ("deepseek-ai/dspark_qwen3_4b_block7", "z-lab/Qwen3-4B-DFlash-b16"),
        _deepspec((5.14, 4.62, 4.16, 3.77, 2.39), (6.11, 5.70, 5.38, 4.86, 3.64)),
        parsers="--reasoning-parser qwen3 --tool-call-parser qwen25",
    ),
    PublishedTarget(
        "Qwen/Qwen3-8B",
        Shape(8.2e9, 8.2e9, 36, 147456),
        (
            "deepseek-ai/eagle3_qwen3_8b_ttt7",
            "AngelSlim/Qwen3-8B_eagle3",
            "Tengyunw/qwen3_8b_eagle3",
            "WhiFlash/Qwen3-8B-EAGLE3",
        ),
        (
            "deepseek-ai/dspark_qwen3_8b_block7",
            "z-lab/Qwen3-8B-DFlash-b16",
            "RedHatAI/Qwen3-8B-speculator.dflash",
        ),
        _deepspec((5.30, 4.77, 4.33, 4.17, 2.66), (6.17, 5.78, 5.52, 5.17, 3.72)),
        (
            Ratio(
                "EAGLE-3, vLLM, H20, mean of five sets (AngelSlim, D-Cut)",
                {4: "2.04", 8: "1.90", 16: "1.52", 32: "1.11", 64: "0.91"},
            ),
            Ratio(
                "DFlash-16, vLLM, H20, the same sets",
                {4: "3.16", 8: "1.87", 16: "1.16", 32: "0.80", 64: "0.65"},
            ),
            Ratio(
                "DSpark of 2.33 tokens a round, H100, SPEED-Bench coding (Dogacel/Qwen3-8B-DSpark)",
                {1: "1.77", 32: "1.29"},
            ),
        ),
        "--reasoning-parser qwen3 --tool-call-parser qwen25",
    ),
    PublishedTarget(
        "meta-llama/Llama-3.1-8B-Instruct",
        Shape(8.0e9, 8.0e9, 32, 131072),
        ("lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"),
        ("z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",),
        Acceptance(
            {name: {AR: length} for name, length in zip(SETS, (2.97, 5.40, 4.91, 4.47, 3.86), strict=True)},
            {AR: 7},
            "EAGLE-3, chains of 7, greedy (SpecForge's dashboard); no block drafter's was found",
        ),
        (Ratio("EAGLE-3, SGLang, chains of 7, by data set (SpecForge)", {1: "1.3 to 3.4"}),),
        "--tool-call-parser llama3",
    ),
    PublishedTarget(
        "Qwen/Qwen3-14B",
        Shape(14.8e9, 14.8e9, 40, 163840),
        ("deepseek-ai/eagle3_qwen3_14b_ttt7", "AngelSlim/Qwen3-14B_eagle3"),
        ("deepseek-ai/dspark_qwen3_14b_block7",),
        _deepspec((5.24, 4.60, 4.14, 4.01, 2.62), (6.21, 5.74, 5.43, 5.02, 3.70)),
        (Ratio("EAGLE-3, vLLM (AngelSlim)", {1: "1.56"}),),
        "--reasoning-parser qwen3 --tool-call-parser qwen25",
    ),
    PublishedTarget(
        "openai/gpt-oss-20b",
        Shape(20.9e9, 3.6e9, 24, 49152, 32, 4, 0.53),
        ("zhuyksir/EAGLE3-gpt-oss-20b-bf16",),
        ("z-lab/gpt-oss-20b-DFlash",),
        parsers="--reasoning-parser gpt-oss --tool-call-parser gpt-oss",
    ),
    PublishedTarget(
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        Shape(30.5e9, 3.3e9, 48, 98304, 128, 8),
        ("lmsys/SGLang-EAGLE3-Qwen3-Coder-30B-A3B-Instruct-SpecForge",),
        ("z-lab/Qwen3-Coder-30B-A3B-DFlash",),
        None,
        (Ratio("EAGLE-3, SGLang, chains of 3, HumanEval and LCB (SpecForge)", {8: "1.99 to 2.02"}),),
        "--tool-call-parser qwen3_coder",
    ),
    PublishedTarget(
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        Shape(30.5e9, 3.3e9, 48, 98304, 128, 8),
        ("lmsys/SGLang-EAGLE3-Qwen3-30B-A3B-Instruct-2507-SpecForge-Nex",),
        ("RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.dflash",),
        None,
        (Ratio("EAGLE-3, SGLang, chains of 3, three sets (SpecForge)", {8: "1.39 to 1.92"}),),
        "--tool-call-parser qwen25",
    ),
    PublishedTarget(
        "Qwen/Qwen3-32B",
        Shape(32.8e9, 32.8e9, 64, 262144),
        ("AngelSlim/Qwen3-32B_eagle3", "RedHatAI/Qwen3-32B-speculator.eagle3"),
        (),
        Acceptance(
            {"GSM8K": {AR: 2.01}, "Alpaca": {AR: 1.90}, "HumanEval": {AR: 1.86}, "MT-Bench": {AR: 1.86}},
            {AR: 2},
            "AngelSlim/Qwen3-32B_eagle3 in vLLM, chains of 2 by its lengths (AngelSlim's documentation)",
        ),
        (Ratio("EAGLE-3, vLLM (AngelSlim)", {1: "1.71"}),),
        "--reasoning-parser qwen3 --tool-call-parser qwen25",
    ),
    PublishedTarget(
        "openai/gpt-oss-120b",
        Shape(116.8e9, 5.1e9, 36, 73728, 128, 4, 0.53),
        ("lmsys/EAGLE3-gpt-oss-120b-bf16", "RedHatAI/gpt-oss-120b-speculator.eagle3"),
        ("z-lab/gpt-oss-120b-DFlash",),
        Acceptance(
            {"MT-Bench": {AR: 2.41, BLOCK: 2.47}},
            {AR: 3, BLOCK: 7},
            "EAGLE-3 of 3 steps and DFlash on MT-Bench, temperature 0.7 (Dogacel/specdrift-gpt-oss-120b-eagle3)",
        ),
        (
            Ratio("EAGLE-3, SGLang, one H100, MT-Bench (Dogacel)", {1: "1.34", 8: "1.31", 64: "1.44"}),
            Ratio("DFlash, SGLang, one H100, MT-Bench (Dogacel)", {1: "1.09", 8: "1.14", 64: "1.07"}),
        ),
        "--reasoning-parser gpt-oss --tool-call-parser gpt-oss",
    ),
)
"""By size."""


def known(target: str) -> PublishedTarget | None:
    """A target by its hub id or the end of it, case apart."""
    name = target.lower()
    return next(
        (entry for entry in KNOWN if name in (entry.name.lower(), entry.name.lower().split("/")[1])), None
    )
