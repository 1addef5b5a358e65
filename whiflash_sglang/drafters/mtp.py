"""A target's own next-token head as the autoregressive arm."""

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.drafters.chain import ChainArm
from whiflash_sglang.models.mtp import MTPDrafter


class MTPArm(ChainArm):
    """A chain whose feature is the target's state behind the final norm.

    Args:
        model: loaded from the target's files. captured, layers, steps: as of `ChainArm`.
    """

    def __init__(
        self, model: MTPDrafter, captured: tuple[int, ...], layers: tuple[int, ...], steps: int
    ) -> None:
        config, weight = model.config, model.projection.weight
        super().__init__(model, 1, config.attention, weight, captured, layers, config.hidden_size, steps)
        self.model = model

    def catch_up(self, rows: FeatureRows) -> None:
        k, v = self.model.keys_values(rows.next_tokens, rows.features, rows.positions)
        # Padding goes to slot 0, which is nobody's: which rows are padding is not for the host to know.
        self.kv.write(0, rows.slots.clamp(min=0), k, v)

    def captured_bytes(self, requests: int) -> int:
        return super().captured_bytes(requests) + self.model.peak_bytes(requests)
