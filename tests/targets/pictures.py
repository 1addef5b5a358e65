"""Requests with images, as SGLang's processors hand them to its scheduler: random pixels, and where they are."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tiny_models import FAVOURED_TOKENS

IMAGE, VISION_START, VISION_END = 300, FAVOURED_TOKENS[11], 302
"""Ids of a target of ours. It likes to write the one before an image, so copies lead into images."""
SIDES = {"qwen2_5_vl": 14}
"""Pixels of a patch's side, by the target's kind of configuration; of others 16."""
MERGED = 2
"""Patches of a side that become one position."""


@dataclass(frozen=True)
class Picture:
    """height, width: patches; a seed's pixels are always the same."""

    seed: int
    height: int = 4
    width: int = 4

    @property
    def positions(self) -> int:
        return self.height * self.width // MERGED**2

    @property
    def grid(self) -> torch.Tensor:
        """[1, 3]: times, height, width."""
        return torch.tensor([[1, self.height, self.width]])

    def pixels(self, kind: str) -> torch.Tensor:
        """[patches, numbers] float32, as Qwen's towers read them: colours, two times, height and width of each."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.height * self.width, 3 * 2 * SIDES.get(kind, 16) ** 2, generator=generator)


Part = Sequence[int] | Picture


def words(seed: int, count: int) -> list[int]:
    """Random text."""
    return random.Random(seed).choices(range(256), k=count)


def prompt_of(parts: Sequence[Part]) -> list[int]:
    """Token ids, an image's with the target's placeholder."""
    ids: list[int] = []
    for part in parts:
        ids += [VISION_START, *[IMAGE] * part.positions, VISION_END] if isinstance(part, Picture) else part
    return ids


def images_of(parts: Sequence[Part], kind: str) -> Any:
    """SGLang's processor's output for the pictures among them, by the target's `kind` of configuration."""
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

    ids, items, at = prompt_of(parts), [], 0
    pictures = [part for part in parts if isinstance(part, Picture)]
    for part in parts:
        if isinstance(part, Picture):
            items.append(
                MultimodalDataItem(
                    modality=Modality.IMAGE,
                    feature=part.pixels(kind),
                    offsets=[(at + 1, at + part.positions)],
                    model_specific_data={"image_grid_thw": part.grid},
                )
            )
        at += len(prompt_of([part]))
    positions, delta = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=MERGED,
        image_token_id=IMAGE,
        video_token_id=-1,
        vision_start_token_id=VISION_START,
        model_type=kind,
        tokens_per_second=4,
        input_ids=torch.tensor([ids]),
        image_grid_thw=torch.cat([picture.grid for picture in pictures]),
    )
    return MultimodalProcessorOutput(
        mm_items=items,
        input_ids=ids,
        im_token_id=IMAGE,
        mrope_positions=positions.squeeze(1),
        mrope_position_delta=delta,
    )


def asking(parts: Sequence[Part], kind: str, **params: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Prompt and parameters of a request for `Engine.submit`."""
    if any(isinstance(part, Picture) for part in parts):
        params["images"] = partial(images_of, list(parts), kind)
    return tuple(prompt_of(parts)), params
