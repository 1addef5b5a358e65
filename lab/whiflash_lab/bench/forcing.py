"""Forces recorded answers on a server without WHIFLASH, by a logit processor that it loads by name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ANSWER = "recorded_answer"
"""Key of the answer's token ids in a request's `custom_params`."""


class Forced:
    """Logit processor that makes the recorded answer's next token the most likely one. SGLang calls it at each step."""

    def __call__(self, logits: torch.Tensor, custom_params: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Return the changed logits, [requests, vocabulary]. A request beyond its answer, or in the midst of a chunked
        prefill, keeps its own."""
        rows, tokens = list[int](), list[int]()
        for row, params in enumerate(custom_params):
            request, answer = params["__req__"], params.get(ANSWER, ())
            at = request.kv.kv_committed_len - len(request.origin_input_ids)
            if 0 <= at < len(answer):
                rows.append(row)
                tokens.append(answer[at])
        logits[rows, tokens] = torch.finfo(logits.dtype).max
        return logits


PROCESSOR = json.dumps({"callable": f"c{__name__}\n{Forced.__name__}\n.".encode().hex()})
"""The request field `custom_logit_processor`: `Forced` as a pickle of its name, so that no client imports SGLang."""
