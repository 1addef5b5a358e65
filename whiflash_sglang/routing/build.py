"""The policy that the settings name."""

from whiflash_sglang.config import Settings
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.routing.policies import AutoPolicy, EntropyPolicy, Pinned, Policy, RandomPolicy


def build_policy(settings: Settings) -> Policy:
    """Raises ConfigError for a policy that this version does not have yet."""
    match settings.router:
        case "auto":
            return AutoPolicy()
        case "entropy":
            return EntropyPolicy(settings.entropy.tau, settings.entropy.min_dwell)
        case "random":
            return RandomPolicy()
        case "ar" | "diffusion" | "lookup" | "none":
            return Pinned(settings.router)
        case other:
            raise ConfigError(
                f"--whiflash-router {other} is not available yet; use auto, entropy, ar, diffusion, lookup or none"
            )
