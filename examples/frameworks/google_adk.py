"""Google ADK: LiteLLM takes an HTTP client; a callback says which agent asks."""

import asyncio
from contextvars import ContextVar
from typing import Any

import litellm
import whiflash_sdk
from google.adk.agents import LlmAgent
from google.adk.models.lite_llm import LiteLlm
from google.adk.runners import InMemoryRunner
from recipe import KEY, MODEL, QUESTION, URL, report

asking: ContextVar[str | None] = ContextVar("asking", default=None)


def note(callback_context: Any, llm_request: Any) -> None:
    asking.set(callback_context.agent_name)


litellm.aclient_session = whiflash_sdk.async_http_client(agent=asking.get)
model = LiteLlm(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, max_tokens=32)
planner = LlmAgent(name="planner", model=model, before_model_callback=note)
with whiflash_sdk.collect() as collected:
    asyncio.run(InMemoryRunner(agent=planner).run_debug(QUESTION, quiet=True))
report("google-adk", "http_client, by litellm.aclient_session", collected.traces)
