"""Every router that a setting can name is built as it is named."""

from typing import get_args

import pytest

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.routing.neural import NeuralPolicy
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, RandomPolicy
from whiflash_sglang.serve.assemble import build_policy
from whiflash_sglang.settings.config import RouterName, Settings, parse_flags, resolve

POLICIES = {"auto": AutoPolicy, "entropy": EntropyPolicy, "neural": NeuralPolicy, "random": RandomPolicy}
NEEDS = {"auto": {"entropy"}, "entropy": {"entropy"}, "neural": {"delta"}}


def settings(router: str, **changes: object) -> Settings:
    return resolve(parse_flags({"router": router}), embedded_bundle()).model_copy(update=changes)


@pytest.mark.parametrize("router", get_args(RouterName))
def test_the_policy_is_the_one_that_is_named(router: str) -> None:
    policy = build_policy(settings("auto").model_copy(update={"router": router}))
    assert type(policy) is POLICIES.get(router, Pinned)
    assert policy.name == router
    assert policy.needs == NEEDS.get(router, set())
    assert policy.joins_arms == (router in ("auto", "random"))


def test_thresholds_and_dwell_are_the_settings() -> None:
    made = settings("neural")
    assert made.neural is not None
    neural = build_policy(made)
    assert isinstance(neural, NeuralPolicy)
    assert (neural.threshold, neural.min_dwell) == (made.neural.threshold, made.neural.min_dwell)
    entropy = build_policy(settings("entropy"))
    assert isinstance(entropy, EntropyPolicy)
    assert (entropy.tau, entropy.min_dwell) == (made.entropy.tau, made.entropy.min_dwell)
    assert NeuralPolicy(1.0).min_dwell == 1


def test_auto_goes_by_heads_where_the_router_has_them() -> None:
    assert build_policy(settings("auto"), heads=True).needs == {"delta"}


def test_a_router_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="router"):
        build_policy(settings("neural", neural=None))
