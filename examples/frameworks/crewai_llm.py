"""CrewAI asks through LiteLLM if it is set to, and LiteLLM takes an HTTP client for all requests.

Its own OpenAI provider shares one `http_client` between a sync and an async client, so it takes neither.
"""

import litellm
import whiflash_sdk
from crewai import LLM, Agent, Crew, Task
from recipe import KEY, MODEL, QUESTION, URL, report

litellm.client_session = http = whiflash_sdk.http_client()
model = LLM(f"openai/{MODEL}", is_litellm=True, base_url=URL, api_key=KEY, max_tokens=32)
planner = Agent(role="planner", goal="Answer.", backstory="You answer.", llm=model, max_iter=1)
task = Task(description=QUESTION, expected_output="Three words.", agent=planner)
with whiflash_sdk.collect(http) as collected, whiflash_sdk.agent("planner"):
    Crew(agents=[planner], tasks=[task]).kickoff()
report("crewai", "http_client, by litellm.client_session", collected.traces)
