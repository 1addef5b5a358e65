"""pydantic-ai: an adapter wraps the model object and knows which agent runs."""

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from recipe import KEY, MODEL, QUESTION, URL, report
from whiflash_sdk import collect
from whiflash_sdk.adapters.pydantic_ai import wrap_model

model = wrap_model(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY)))
planner = Agent(model, name="planner", model_settings={"max_tokens": 32})
with collect() as collected:
    planner.run_sync(QUESTION)
report("pydantic-ai-slim", "adapter", collected.traces)
