"""DSPy asks through LiteLLM if it is set to, and LiteLLM takes an HTTP client for all requests."""

import dspy
import litellm
import whiflash_sdk
from recipe import KEY, MODEL, QUESTION, URL, report

litellm.client_session = http = whiflash_sdk.http_client()
asked = {"api_base": URL, "api_key": KEY, "max_tokens": 32, "cache": False}
lm = dspy.LM(f"openai/{MODEL}", engine="litellm", **asked)
with whiflash_sdk.collect(http) as collected, whiflash_sdk.agent("planner"):
    lm(QUESTION)  # dspy.Predict asks through it too; the embedded model cannot answer in its format
report("dspy", "http_client, by litellm.client_session", collected.traces)
