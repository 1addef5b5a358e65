"""Names of the arms a round can be routed to.

An arm is a way to draft. Code that routes is written for any number of arms and treats these as opaque
names; only the drafter that implements an arm knows more about it.
"""

AR = "ar"
"""An autoregressive chain: EAGLE-3 (arXiv 2503.01840), or the target's own next-token head."""

DIFFUSION = "diffusion"
"""DFlash: one block in one non-causal pass (arXiv 2602.06036)."""

PAIR = (AR, DIFFUSION)
"""The trained drafters, between which the paper's routers choose; a server may have one of them only."""

LOOKUP = "lookup"
"""Copying from the request's own context; no training, no forward pass."""

STRUCTURE = "structure"
"""Text that a grammar forces next; no training, no forward pass."""

UNO = "uno"
"""The target itself, under a LoRA adapter: one block in one causal pass of the target (sglang#37667)."""

NONE = "none"
"""No neural pass: the round verifies candidates; without candidates it is a plain decoding step."""

PROMISED = "promised"
"""Label of rounds without a pass in which a candidate was expected to bring tokens; no request is routed to it."""
