"""smolagents: an adapter wraps the model object and knows which agent runs."""

from recipe import KEY, MODEL, QUESTION, URL, report
from smolagents import OpenAIModel, ToolCallingAgent
from whiflash_sdk import collect
from whiflash_sdk.adapters.smolagents import wrap_model

model = wrap_model(OpenAIModel(MODEL, api_base=URL, api_key=KEY, flatten_messages_as_text=True, max_tokens=32))
planner = ToolCallingAgent(tools=[], model=model, name="planner", max_steps=1, verbosity_level=0)
with collect() as collected:
    planner.run(QUESTION)
report("smolagents", "adapter", collected.traces)
