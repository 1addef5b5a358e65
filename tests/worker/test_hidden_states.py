"""`return_hidden_states`: the target's own, one of every committed token, as plain decoding returns them."""

import random
from typing import Any

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from oracle_arm import OracleArm
from traffic import Arrival, play

OPTIONS: dict[str, Any] = {
    "enable_return_hidden_states": True,
    "max_running_requests": 6,
    "chunked_prefill_size": 32,
    "skip_tokenizer_init": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "all": {"return_hidden_states": True},
    "last": {"return_hidden_states": "last"},
    "last-stopped": {"return_hidden_states": "last", "stop": ["E", "N"]},
    "all-stopped": {"return_hidden_states": True, "stop_token_ids": [70, 77, 80], "ignore_eos": False},
    "none": {},
}


def requests() -> list[Arrival]:
    rng = random.Random(2)
    return [
        Arrival(
            f"{kind}/{i}",
            rng.randint(0, 10),
            tuple(rng.choices(range(32, 127), k=rng.randint(4, 50))),
            {"max_new_tokens": 24, **params},
        )
        for i in range(2)
        for kind, params in KINDS.items()
    ]


def hidden_states(e: Engine, rid: str) -> list[torch.Tensor]:
    """What a client would get, as the output streamer cuts it: the prompt's, then one a token."""
    req = e.requests[rid]
    states = req.hidden_states[-1:] if req.return_hidden_states == "last" else req.hidden_states
    return [torch.tensor(state) for state in states[: req.finished_len]]


@pytest.mark.parametrize("router", ["ar", "diffusion", "random", "none"])
def test_hidden_states(models: Models, router: str) -> None:
    arrivals = requests()
    with engine(models.target, **OPTIONS) as e:
        outputs = play(e, arrivals)
        wanted = {rid: hidden_states(e, rid) for rid in outputs}
        beyond = e.generate([a.prompt for a in arrivals], max_new_tokens=32)
    assert all(bool(states) == (not rid.startswith("none")) for rid, states in wanted.items())
    oracle = OracleArm(0.9, alphabet=range(32, 127))
    for a, text in zip(arrivals, beyond, strict=True):
        oracle.learn(a.prompt, text)  # past the stops
    arms = [oracle] if router == "random" else []
    with engine(models.target, whiflash=models.whiflash(router), arms=arms, **OPTIONS) as e:
        assert play(e, arrivals) == outputs
        for rid in outputs:
            found = hidden_states(e, rid)
            assert [s.ndim for s in found] == [s.ndim for s in wanted[rid]], rid
            for ours, plain in zip(found, wanted[rid], strict=True):
                # Of a prompt SGLang returns what its last chunk had: chunks depend on who else is there.
                rows = min(len(ours), len(plain))
                torch.testing.assert_close(ours[-rows:], plain[-rows:], atol=1e-4, rtol=1e-4)
    assert router != "random" or max(oracle.accepted) == oracle.max_drafts
