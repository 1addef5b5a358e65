"""Models that the parts serve: the user's pair, the embedded one, or tiny random ones if neither is within reach."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "targets"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "phantom"))

from tiny_models import tiny_bundle, tiny_target


@dataclass(frozen=True)
class Served:
    """name: as it stands in records. target, bundle: directories. dtype: of the target, as SGLang's flag.

    model: the same weights in Hugging Face's class (`families.py`), where the target is no Llama; it has no tokenizer.
    options: that its engines need.
    """

    name: str
    target: Path
    bundle: Path
    dtype: str
    model: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, model_path: str | None, bundle: str | None, scratch: Path, *, rehearse: bool) -> "Served":
        """The pair that was asked for, the embedded one, or tiny models under `scratch`: those in a rehearsal too.

        Raises:
            WhiflashError: what was asked for is not there.
        """
        from whiflash_sglang.checkpoints.hub import fetch
        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded import EmbeddedTargetError, ensure_target

        if model_path and bundle:
            return cls(f"{model_path} with {bundle}", fetch(model_path), fetch(bundle), "bfloat16")
        if rehearse:
            return cls.tiny("tiny random models", scratch, "float32")
        try:
            return cls("the embedded pair", ensure_target(), embedded_bundle(), "bfloat16")
        except EmbeddedTargetError as error:
            return cls.tiny(f"tiny random models: {error}", scratch, "bfloat16")

    @classmethod
    def tiny(cls, name: str, root: Path, dtype: str) -> "Served":
        """Random models, written to `root`."""
        target = tiny_target(root / "target", dtype=dtype)
        return cls(name, target, tiny_bundle(root / "bundle", target, str(target)), dtype)

    @classmethod
    def family(cls, architecture: str, root: Path, dtype: str) -> "Served":
        """A random model of a family of targets, written to `root`; what it keeps beside KV goes into the tree."""
        from families import FAMILIES, tiny_family

        target = root / "target"
        model = tiny_family(target, FAMILIES[architecture])
        bundle = tiny_bundle(root / "bundle", target, str(target))
        return cls(f"a tiny {architecture}", target, bundle, dtype, model, KEEPING.get(architecture, {}))


KEEPING: Mapping[str, Mapping[str, Any]] = {"GptOssForCausalLM": {"swa_full_tokens_ratio": 0.5}} | {
    architecture: {"mamba_radix_cache_strategy": "extra_buffer", "mamba_track_interval": 64}
    for architecture in ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "KimiLinearForCausalLM", "NemotronHForCausalLM")
}
"""Families of which SGLang's tree keeps states at intervals, and one whose windowed layers have a pool of their own."""


@contextmanager
def on_device(device: str, scratch: Path) -> Iterator[None]:
    """Enter before SGLang is imported: the phantom card, and what the kit has in place of SGLang's operators."""
    with ExitStack() as stack:
        if device == "phantom":
            from card import phantom
            from upstream import ENVIRONMENT, driver, sglang_on_card

            os.environ |= ENVIRONMENT
            world = stack.enter_context(phantom())
            driver(scratch)
            stack.enter_context(sglang_on_card(world))
        if device == "cuda":
            # On the phantom card torch computes the same, much faster than Triton's interpreter.
            import sgl_kernel

            stack.enter_context(getattr(sgl_kernel, "standing_in", ExitStack)())
        yield


@contextmanager
def started(target: Path, device: str, *, attention: str, **options: Any) -> Iterator[Any]:
    """An engine whose passes are timed, in SGLang's overlap loop where there is a card.

    attention: its backend on a card; SGLang's own choice if empty.
    """
    from engine import engine
    from overlap_loop import OverlapLoop

    card = device != "cpu"
    options |= {"device": "cuda" if card else "cpu", "dtype": "bfloat16" if device == "cuda" else "float32"}
    options |= {"disable_overlap_schedule": not card, "random_seed": 0}
    if card:
        options["cuda_graph_backend_prefill"] = "disabled"  # prompts are cached
        options |= {"attention_backend": attention} if attention else {}
        options |= {} if find_spec("flashinfer") else {"sampling_backend": "pytorch"}
    with engine(target, **options) as e:
        yield OverlapLoop(e.scheduler) if card else e
