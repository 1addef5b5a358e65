"""LiteLLM takes an HTTP client for all requests."""

import litellm
import whiflash_sdk
from recipe import KEY, MESSAGES, MODEL, URL, report

litellm.client_session = whiflash_sdk.http_client()
with whiflash_sdk.collect() as collected, whiflash_sdk.agent("planner"):
    litellm.completion(f"openai/{MODEL}", api_base=URL, api_key=KEY, messages=MESSAGES, max_tokens=32)
report("litellm", "http_client, by litellm.client_session", collected.traces)
