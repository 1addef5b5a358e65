"""OpenAI Agents SDK: an adapter wraps the model object and knows which agent runs."""

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from recipe import KEY, MODEL, QUESTION, URL, report
from whiflash_sdk import collect
from whiflash_sdk.adapters.openai_agents import wrap_model

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=URL, api_key=KEY)
model = wrap_model(OpenAIChatCompletionsModel(model=MODEL, openai_client=client))
planner = Agent(name="planner", model=model, model_settings=ModelSettings(max_tokens=32))
with collect() as collected:
    Runner.run_sync(planner, QUESTION)
report("openai-agents", "adapter", collected.traces)
