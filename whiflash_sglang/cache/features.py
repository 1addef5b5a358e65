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
        index = tuple(captured.index(layer) for layer in wanted)
        self.hidden, self._layers = hidden, len(captured)
        self.chunks = None if index == tuple(range(len(captured))) else index
        """Places of its layers among the captured ones, as kernels take them; None: they are the captured ones."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[T, U * H] → [T, len(wanted) * H]; the input itself when nothing has to be selected."""
        if self.chunks is None:
            return features
        grid = features.view(-1, self._layers, self.hidden)
        return torch.cat([grid[:, i] for i in self.chunks], dim=-1)
