"""WhiFlash's client side: sends routing hints with OpenAI's and Anthropic's clients, and reads routing traces."""

import logging

from whiflash_sdk import presets, spans
from whiflash_sdk.agents import agent
from whiflash_sdk.blocks import predict
from whiflash_sdk.capabilities import Capabilities, async_capabilities, capabilities
from whiflash_sdk.client import wrap
from whiflash_sdk.collecting import Collected, collect
from whiflash_sdk.doctor import Finding, async_doctor, doctor, explain
from whiflash_sdk.errors import HintError, TraceError, UnsupportedServerError, UnsupportedServerWarning, WhiFlashError
from whiflash_sdk.hints import Arm, Hints, Kind, Span, TraceLevel
from whiflash_sdk.report import Report, Share
from whiflash_sdk.session import Session
from whiflash_sdk.spans import hinted
from whiflash_sdk.trace import ArmTotals, CollectedTrace, SourceTotals, Stretch, Trace, routing
from whiflash_sdk.transport import async_http_client, http_client

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = ["Arm", "ArmTotals", "Capabilities", "Collected", "CollectedTrace", "Finding", "HintError"]
__all__ += ["Hints", "Kind", "Report", "Session", "Share", "SourceTotals", "Span", "Stretch", "Trace"]
__all__ += ["TraceError", "TraceLevel", "UnsupportedServerError", "UnsupportedServerWarning"]
__all__ += ["WhiFlashError", "agent", "async_capabilities", "async_doctor", "async_http_client"]
__all__ += ["capabilities", "collect", "doctor", "explain", "hinted", "http_client", "predict", "presets"]
__all__ += ["routing", "spans", "wrap"]
