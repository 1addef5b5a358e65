"""AG2: its configuration of OpenAI's client takes an HTTP client; each agent has one of its own."""

import asyncio

import whiflash_sdk
from ag2 import Agent
from ag2.config import OpenAIConfig
from recipe import KEY, MODEL, QUESTION, URL, report

http = whiflash_sdk.async_http_client(agent="planner")
config = OpenAIConfig(MODEL, base_url=URL, api_key=KEY, max_tokens=32, http_client=http)
with whiflash_sdk.collect(http) as collected:
    asyncio.run(Agent("planner", config=config).ask(QUESTION))
report("ag2", "http_client", collected.traces)
