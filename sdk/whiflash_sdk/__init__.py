"""WhiFlash's client side: routing hints on the OpenAI client, and what they bought."""

from whiflash_sdk import presets, spans
from whiflash_sdk.capabilities import Capabilities, async_capabilities, capabilities
from whiflash_sdk.client import wrap
from whiflash_sdk.collecting import Collected, collect
from whiflash_sdk.errors import (
    HintError,
    TraceError,
    UnsupportedServerError,
    UnsupportedServerWarning,
    WhiFlashError,
)
from whiflash_sdk.hints import Arm, Hints, Kind, Span
from whiflash_sdk.spans import hinted
from whiflash_sdk.streaming import AsyncTracedStream, TracedStream, traced
from whiflash_sdk.trace import ArmTotals, Stretch, Trace, routing

__version__ = "0.1.0"

__all__ = [
    "Arm",
    "ArmTotals",
    "AsyncTracedStream",
    "Capabilities",
    "Collected",
    "HintError",
    "Hints",
    "Kind",
    "Span",
    "Stretch",
    "Trace",
    "TraceError",
    "TracedStream",
    "UnsupportedServerError",
    "UnsupportedServerWarning",
    "WhiFlashError",
    "async_capabilities",
    "capabilities",
    "collect",
    "hinted",
    "presets",
    "routing",
    "spans",
    "traced",
    "wrap",
]
