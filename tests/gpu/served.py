"""What the parts serve: the user's pair, the embedded one, or tiny random models where neither is within reach."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

MANIFEST = '{"schema_version": 1, "name": "tiny", "target": "tiny", "eagle3": "eagle3", "dflash": "dflash"}'


@dataclass(frozen=True)
class Served:
    """name: as it stands in records. target, bundle: directories. dtype: of the target, as SGLang's flag."""

    name: str
    target: Path
    bundle: Path
    dtype: str

    @classmethod
    def find(cls, model_path: str | None, bundle: str | None, scratch: Path, *, rehearse: bool) -> "Served":
        """The pair that was asked for, the embedded one, or tiny models under `scratch`: those in a rehearsal too.

        Raises:
            WhiflashError: what was asked for is not there.
        """
        from whiflash_sglang.checkpoints.hub import fetch
        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded import ensure_target
        from whiflash_sglang.embedded.wheel import EmbeddedTargetError

        if model_path and bundle:
            return cls(f"{model_path} with {bundle}", fetch(model_path), fetch(bundle), "bfloat16")
        if rehearse:
            return cls.tiny("tiny random models", scratch, "float32")
        try:
            return cls("the embedded pair", ensure_target(progress=False), embedded_bundle(), "bfloat16")
        except EmbeddedTargetError as error:
            return cls.tiny(f"tiny random models: {error}", scratch, "bfloat16")

    @classmethod
    def tiny(cls, name: str, root: Path, dtype: str) -> "Served":
        """Random models, written to `root`."""
        target, bundle = tiny_target(root / "target", dtype=dtype), root / "bundle"
        tiny_eagle3(bundle / "eagle3", target)
        tiny_dflash(bundle / "dflash", target)
        (bundle / "whiflash.json").write_text(MANIFEST)
        return cls(name, target, bundle, dtype)
