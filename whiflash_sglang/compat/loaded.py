"""A target that SGLang has loaded: its sizes, and the vocabulary that drafters share with it."""

from typing import Any

import torch

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.compat.captured import language_model
from whiflash_sglang.compat.parallel import input_embedding, is_quantised, rows_here, shared_vocabulary
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.vocabulary import SharedVocabulary


class LoadedTarget:
    """What a worker of SGLang's serves with."""

    def __init__(self, target_worker: Any) -> None:
        self.worker = target_worker
        self.runner = target_worker.model_runner
        self.model = self.runner.model
        self._text = language_model(self.model)
        self.shape = TargetShape.of(target_worker.model_config)
        self.dtype: torch.dtype = self.runner.dtype
        self.device = torch.device(self.runner.device)

    @property
    def shared(self) -> SharedVocabulary | None:
        """The vocabulary where several processes have parts of it, or it is quantised; else None."""
        return shared_vocabulary(self._text, self.shape.vocab_size)

    @property
    def embedding(self) -> torch.Tensor:
        """[V, H] input embedding, without padding rows; those of this process where it is split, none if quantised."""
        return self._matrix("input embedding", input_embedding(self._text))

    @property
    def embedding_scale(self) -> float:
        """What rows of `embedding` are multiplied by before the first layer; what is `shared` is multiplied already."""
        return 1.0 if self.shared and self.shared.embed else self.row_scale

    @property
    def row_scale(self) -> float:
        """What the embedding's own module multiplies its rows by (Gemma)."""
        return float(getattr(input_embedding(self._text), "embed_scale", 1.0))

    @property
    def lm_head(self) -> torch.Tensor:
        """[V, H] output projection, as `embedding`."""
        return self._matrix("output head", self._text.lm_head)

    def _matrix(self, what: str, module: Any) -> torch.Tensor:
        """Rows of the vocabulary of a module's weight. Raises CheckpointError where that is no plain matrix, though
        SGLang has no quantisation for it."""
        hidden_size = self.shape.hidden_size
        if is_quantised(module):
            return torch.empty(0, hidden_size, dtype=self.dtype, device=self.device)
        weight: torch.Tensor = module.weight
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.shape[1] != hidden_size:
            raise CheckpointError(
                f"the target's {what} is {weight.dtype} {list(weight.shape)}, no matrix of 16 or 32 bits over "
                f"{hidden_size}; use another checkpoint"
            )
        rows = rows_here(module, self.shape.vocab_size)
        # Itself where there is no padding: a packed copy stays with the tensor object, and so serves drafters too.
        return weight if rows == len(weight) else weight[:rows]
