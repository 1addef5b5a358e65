"""Draws of `sample_rows` beside those of SGLang's default sampler on a card: `sampler.py cuda figures.json`.

SGLang calls FlashInfer's operators there. They are the installed package's, or those that the kit has compiled. Both
samplers draw from the same random logits under what agents send; their counts must be of one distribution (a test of
homogeneity, `LEAST`). A rehearsal draws by `Formula` in FlashInfer's place.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from checks import Checks
from kit import SAMPLER
from run import SITE
from whiflash_kernels import SamplingTable, sample_rows

VOCABULARY, ROWS = 700, 5_000
TIMES = {"cuda": 20, "cpu": 1}
LEAST = 1e-5
"""Least chance of such counts from one distribution."""
EVERY = 1 << 30
"""Top-k of a request that has none."""
ASKED = {
    "qwen3": (0.6, 20, 0.95, 0.0),
    "top-p": (0.7, EVERY, 0.8, 0.0),
    "top-k": (1.0, 40, 1.0, 0.0),
    "whole": (1.0, EVERY, 1.0, 0.0),
    "min-p": (1.0, EVERY, 1.0, 0.05),
    "all": (0.7, 20, 0.8, 0.01),
    "all, hot": (1.5, 50, 0.9, 0.1),
}
"""Temperature, top-k, top-p and min-p."""


class Formula:
    """FlashInfer's operators, by what they say that they do; each writes its second argument."""

    def top_k_renorm_probs(self, probs: torch.Tensor, out: torch.Tensor, ks: torch.Tensor, *_: Any) -> None:
        self._renorm(probs, out, probs >= self._kth(probs, ks))

    def top_p_renorm_probs(self, probs: torch.Tensor, out: torch.Tensor, ps: torch.Tensor, *_: Any) -> None:
        self._renorm(probs, out, self._likelier(probs) < ps[:, None])

    def min_p_sampling_from_probs(self, probs: torch.Tensor, out: torch.Tensor, *rest: Any) -> None:
        out.copy_(probs.masked_fill(probs < probs.amax(1, True) * rest[2][:, None], 0).multinomial(1)[:, 0])

    def top_k_top_p_sampling_from_probs(self, probs: torch.Tensor, out: torch.Tensor, *rest: Any) -> None:
        kept = (probs >= self._kth(probs, rest[2])) & (self._likelier(probs) < rest[4][:, None])
        out.copy_(probs.masked_fill(~kept, 0).multinomial(1)[:, 0])

    @staticmethod
    def _kth(probs: torch.Tensor, ks: torch.Tensor) -> torch.Tensor:
        return probs.sort(1, descending=True).values.gather(1, ks.long()[:, None] - 1)

    @staticmethod
    def _likelier(probs: torch.Tensor) -> torch.Tensor:
        """The mass of likelier tokens, for each token [rows, vocabulary]."""
        ordered, order = probs.sort(1, descending=True)
        return torch.zeros_like(probs).scatter_(1, order, ordered.cumsum(1) - ordered)

    @staticmethod
    def _renorm(probs: torch.Tensor, out: torch.Tensor, kept: torch.Tensor) -> None:
        out.copy_(probs * kept / (probs * kept).sum(1, keepdim=True))


def operators(device: str) -> Any:
    """FlashInfer's module of sampling operators; None if there is none."""
    if device != "cuda":
        return Formula()
    try:
        from flashinfer.jit.sampling import gen_sampling_module
    except ImportError:
        pass
    else:
        return gen_sampling_module().build_and_load()
    if not (SITE / SAMPLER).exists():
        return None
    import tvm_ffi

    return tvm_ffi.load_module(str(SITE / SAMPLER))


def by_flashinfer(module: Any, logits: torch.Tensor, asked: tuple[float, int, float, float], seed: int) -> Any:
    """A token a row, [rows] int64, as SGLang's `Sampler` draws it with `sampling_backend` flashinfer."""
    temperature, top_k, top_p, min_p = asked
    rows, size = logits.shape
    probs = (logits / temperature).softmax(-1)
    tokens, valid = probs.new_empty(rows, dtype=torch.int32), probs.new_empty(rows, dtype=torch.bool)
    ks = torch.full_like(tokens, min(top_k, size))
    ps, ms = (torch.full_like(probs[:, 0], value).contiguous() for value in (top_p, min_p))
    drawn = (tokens, valid, None)
    noise = (True, None, seed, None, 0)
    if not min_p:
        module.top_k_top_p_sampling_from_probs(probs, *drawn, ks, 0, ps, 0.0, *noise)
        return tokens.long()
    of_k, of_p = torch.empty_like(probs), torch.empty_like(probs)
    module.top_k_renorm_probs(probs, of_k, ks, 0, False, probs.new_zeros(1 << 20, dtype=torch.uint8))
    work = probs.new_empty(rows * (1 << 15), dtype=torch.uint8)  # counters, two histograms and buffers a row
    module.top_p_renorm_probs(of_k, of_p, ps, 0.0, False, work)
    module.min_p_sampling_from_probs(of_p, *drawn, ms, 0.0, *noise)
    return tokens.long()


def by_us(logits: torch.Tensor, asked: tuple[float, int, float, float], begin: int) -> torch.Tensor:
    """A token a row, [rows] int64: one request's rows at positions from `begin` on."""
    ints = {"dtype": torch.int64, "device": logits.device}
    parameters = torch.tensor([[*asked[:3], -asked[3]]] * 2, device=logits.device)  # as of this backend
    table = SamplingTable(parameters, torch.tensor([0, 7 << 40], **ints))
    indptr, lengths = torch.tensor([0, len(logits)], **ints), torch.tensor([begin], **ints)
    return sample_rows(logits, indptr.int(), lengths, torch.ones(1, **ints), table)


def compare(module: Any, device: str, asked: tuple[float, int, float, float], figures: dict[str, Any]) -> None:
    """Raises AssertionError if the two samplers' counts are not of one distribution."""
    from scipy.stats import chi2_contingency

    logits = 1.5 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(len(figures)))
    rows = logits.to(device).expand(ROWS, -1).contiguous()
    counts = torch.zeros(2, VOCABULARY, dtype=torch.int64)
    for time in range(TIMES[device]):
        draws = (by_us(rows, asked, time * ROWS), by_flashinfer(module, rows, asked, time))
        counts += torch.stack([tokens.bincount(minlength=VOCABULARY).cpu() for tokens in draws])
    often = counts.sum(0) >= 20
    table = torch.cat([counts[:, often], counts[:, ~often].sum(1, keepdim=True)], 1)
    table = table[:, table.sum(0) > 0]
    figures["kept"] = (counts > 0).sum(1).tolist()
    figures["chance"] = float(chi2_contingency(table.numpy()).pvalue) if table.shape[1] > 1 else 1.0
    assert figures["chance"] > LEAST, f"tokens drawn by us and by FlashInfer: {figures['kept']}"


def main() -> int:
    checks, device = Checks(Path(sys.argv[2])), sys.argv[1]
    if (module := operators(device)) is None:
        return checks.leave_out("needs FlashInfer's operators")
    for name, asked in ASKED.items():
        with checks.check(name) as figures:
            compare(module, device, asked, figures)
    return checks.exit_status


if __name__ == "__main__":
    sys.exit(main())
