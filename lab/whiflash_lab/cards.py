"""Prices of a card in seconds: fits to published tables (`Card`), or to recorded rounds (`FittedCard`)."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import ClassVar

from pydantic import TypeAdapter

from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import UsageError
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, read_json_file
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications

DRAFTS = {arms.AR: 4, arms.DIFFUSION: 15}
"""Drafts of a full round: an EAGLE-3 chain of four steps, a DFlash block of 16 rows."""

KNOWN = 16
"""Most drafts of a round that the host knows (`tests/planning_time.py --agents`)."""


@dataclass(frozen=True, slots=True)
class Card:
    """Prices of a GPU in seconds. fixed: a forward of any size. row: one more row. token: one more token of context.

    chain: an EAGLE-3 step. block: a DFlash block, with the round's own work. experts: reading all experts. share: part
    of the experts that one row uses, drawn by chance for each row. deep: one more row, for each token of all contexts.
    """

    name: str
    fixed: float
    row: float
    token: float
    chain: float
    block: float
    experts: float = 0.0
    share: float = 1.0
    deep: float = 0.0

    def verify(self, rows: float, context: float) -> float:
        read: float = self.experts * (1 - (1 - self.share) ** rows)
        return self.fixed + self.row * rows + (self.token + self.deep * rows) * context + read

    def prefill(self, tokens: int) -> float:
        return self.verify(tokens, 0)

    def forward(self, tables: CostTables, rows: int, widths: Sequence[int], contexts: Sequence[int]) -> float:
        """Return the seconds of a verification in a graph of `rows` rows. widths: rows of each request."""
        return tables.verifications.at(rows, sum(contexts))

    def drafting(self, tables: CostTables, arm: str, requests: int, drafts: int, caught_up: int) -> float:
        """Return the seconds of an arm's pass for `requests` requests, after a catch-up of `caught_up` tokens."""
        return tables.draft(arm, requests, drafts)

    def tables(self, rows: int, context: int, chain: int = DRAFTS[arms.AR]) -> CostTables:
        """Return the price tables that a server would measure at its start on this card.

        rows, context: the largest. chain: length of a full chain.
        """
        sizes = grid(rows)
        drafts = {arms.AR: chain * self.chain, arms.DIFFUSION: self.block}
        by_arm = {arm: Sizes(tuple(sizes), (price,) * len(sizes)) for arm, price in drafts.items()}
        chains = {n: Sizes(tuple(sizes), (n * self.chain,) * len(sizes)) for n in range(2, chain)}
        return CostTables(Verifications.measured(1, max(context, 2), sizes, self.verify), by_arm, {}, {arms.AR: chains})


@dataclass(frozen=True, slots=True)
class FittedCard:
    """Prices of Qwen3-8B's shape on an H200, fitted to recorded rounds, which a start's tables only approximate.

    Fitted to `diffusion` at four loads and to stock plain decoding at three, within 2 % each. Estimated, not fitted:
    attention's tile for a request's rows, the round's own work. Rates leave prefills out.

    Args:
        recorded: prices of the start of that record. own_plain: whether rounds without drafts read the cache by the
            verification's kernel, as a server of 586c31c3 does, or by stock decoding's.
    """

    recorded: CostTables
    own_plain: bool = True
    name: str = "H200"

    LAYERS: ClassVar[int] = 36
    OWN: ClassVar[float] = 0.35e-3
    """Seconds of a round besides the target's forward: estimated between 0.1 and 0.6 ms."""
    OWN_PLAIN: ClassVar[tuple[float, float]] = (10e-6, 0.3e-6)
    """Seconds of a round besides a forward of stock decoding, and of each request: computed for four launches more than
    stock's and 1 MB per row, as counted on the phantom card (`docs/dev/findings.md`).
    """
    DRAFTED: ClassVar[float] = 0.25e-3
    """Seconds that a round with a draft pass takes besides, in addition to OWN."""
    PASS_ISSUED: ClassVar[float] = 0.2e-3

    def stock(self, requests: int, context: int) -> float:
        """Return the seconds of a step of stock plain decoding."""
        return 5.45e-3 + self._read((0,) * requests, (context / requests,) * requests)

    def prefill(self, tokens: int) -> float:
        return 0.0

    def _read(self, widths: Sequence[int], contexts: Sequence[float]) -> float:
        """Return the seconds to read all contexts, each by the kernel for its rows in `widths`; 0: stock decoding's."""
        each = (_TOKENS[bisect_left(_WIDTHS, width)] for width in widths)
        return self.LAYERS * 1e-9 * float(sum(map(mul, each, contexts)))

    def _forward(self, rows: float) -> float:
        return self.recorded.verifications.at_short.at(rows) - 1.46e-3 + self.OWN

    def forward(self, tables: CostTables, rows: int, widths: Sequence[int], contexts: Sequence[int]) -> float:
        if max(widths) == 1 and not self.own_plain:
            return self._plain(len(widths), sum(contexts))
        return self._verification(rows, widths, contexts)

    def _plain(self, requests: int, context: int) -> float:
        fixed, each = self.OWN_PLAIN
        return self.stock(requests, context) + fixed + each * requests

    def _verification(self, rows: float, widths: Sequence[int], contexts: Sequence[float]) -> float:
        return self._forward(rows) + self._read(widths, contexts)

    def drafting(self, tables: CostTables, arm: str, requests: int, drafts: int, caught_up: int) -> float:
        seconds = self.recorded.draft(arm, requests, drafts) - self.PASS_ISSUED
        return max(seconds, 0.2e-3) + self.recorded.catch(arm, min(caught_up, 768)) + self.DRAFTED

    def tables(self, rows: int, context: int, chain: int = 0) -> CostTables:
        """Return the price tables of a server's start. rows: the largest, of full blocks of all requests."""
        most = rows // (KNOWN + 1)
        sizes = [n for n in (*self.recorded.verifications.at_short.sizes, 896, 1024, 1088) if n <= grid(rows)[-1]]

        def price(most: int, rows: int, context: int) -> float:
            count = min(rows, most)
            widths = [rows // count + (i < rows % count) for i in range(count)]
            return self._verification(rows, widths, [context // count] * count)

        def alone(prices: Sizes) -> Sizes:
            return Sizes(prices.sizes, tuple(max(each - self.PASS_ISSUED, 0.2e-3) for each in prices.seconds))

        found, above = self.recorded, _WIDTHS[1]
        wide = Verifications.measured(
            *(8192, 131072, sizes[bisect_left(sizes, above + 1) :]),
            lambda rows, context: price(min(rows // (above + 1), most), rows, context),
        )
        return CostTables(
            Verifications.measured(8192, 131072, sizes, partial(price, most)),
            {arm: alone(prices) for arm, prices in found.drafts.items()},
            found.catch_up,
            {arm: {n: alone(prices) for n, prices in each.items()} for arm, each in found.shorter.items()},
            {above: wide},
            None if self.own_plain else Verifications.measured(8192, 131072, sizes, self._plain),
        )


def recorded(figures: Path) -> CostTables:
    """Return the price tables of `auto` in a record of `tests/gpu/shaped.py`. Raises UsageError for another file."""
    try:
        prices = read_json_file(figures)["figures"]["checks"]["auto"]["prices"]
        return TypeAdapter(CostTables).validate_python(prices, strict=False)
    except NOT_AS_WRITTEN:
        raise UsageError(f"--figures {figures}: no record of tests/gpu/shaped.py with prices of `auto`") from None


_WIDTHS, _TOKENS = (0, 4, 8), (1.4, 1.8, 2.5, 4.5)
"""Most rows of a request in each tile, and nanoseconds to read a token of context in a layer: by stock decoding, then
by the verification's kernel in tiles of 16, 32 and 64 rows of query heads."""


def grid(largest: int) -> list[int]:
    """Return the sizes of graphs: every size up to 8, then sixteenths of the power of two above, at least 4 apart."""
    sizes = list(range(1, 9))
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(4, (1 << sizes[-1].bit_length()) // 16))
    return sizes


PARAMETERS = 8.2e9
ROW = 2 * PARAMETERS
"""Operations of a row of Qwen3-8B. At a card's peak rate they give the published price of a row within 12 %."""
CONTEXT = 768
"""Assumed tokens of a request, to convert a published price of one more request into that of a token."""

H100 = Card("H100", 6.97e-3, ROW / 989e12, 0.15e-3 / CONTEXT, 0.55e-3, 1.25e-3)
"""fixed: plain decoding in bf16 at 4 requests, 7.04 ms, less its rows. A request and a chain step: SGLang's FP8 rounds.
block: DFlash's throughput on an H20, less its verifications."""
