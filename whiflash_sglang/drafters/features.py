"""Each drafter's slice of the one capture."""

import torch


class FeatureSlice:
    """Selects a drafter's layers out of the captured union.

    The target captures the union of all drafters' layers once, concatenated in layer order: [T, U * H].

    Args:
        captured: the union, ascending. wanted: the drafter's layers in the order its projection expects.
        hidden: the target's hidden size H.

    Raises:
        ValueError: a wanted layer is not captured.
    """

    def __init__(self, captured: tuple[int, ...], wanted: tuple[int, ...], hidden: int) -> None:
        missing = sorted(set(wanted) - set(captured))
        if missing:
            raise ValueError(f"layers {missing} are not captured; the target captures {list(captured)}")
        self._hidden = hidden
        self._layers = len(captured)
        self._index: list[int] | None = [captured.index(layer) for layer in wanted]
        if self._index == list(range(len(captured))):
            self._index = None

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[T, U * H] → [T, len(wanted) * H]; the input itself when nothing has to be selected."""
        if self._index is None:
            return features
        grid = features.view(-1, self._layers, self._hidden)
        return torch.cat([grid[:, i] for i in self._index], dim=-1)
