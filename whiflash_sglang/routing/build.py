"""The policy that the settings name."""

from whiflash_sglang.config import NO_ROUTER, Settings
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.routing.neural import NeuralPolicy
from whiflash_sglang.routing.policies import AutoPolicy, CopyRule, EntropyPolicy, Pinned, Policy, RandomPolicy


def build_policy(settings: Settings, *, heads: bool = False) -> Policy:
    """`heads`: whether the loaded router predicts acceptance lengths. Raises ConfigError where a router is missing."""
    match settings.router:
        case "auto":
            return AutoPolicy(heads=heads)
        case "entropy":
            return EntropyPolicy(settings.entropy.tau, settings.entropy.min_dwell)
        case "random":
            return RandomPolicy()
        case "ar" | "diffusion" | "lookup" | "none":
            return Pinned(settings.router)
        case "copy-rule":
            return CopyRule()
        case "neural":
            if settings.neural is None:
                raise ConfigError(NO_ROUTER)
            return NeuralPolicy(settings.neural.threshold, settings.neural.min_dwell)
