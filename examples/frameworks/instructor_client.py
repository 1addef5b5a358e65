"""Instructor patches a client that was wrapped before."""

import instructor
import whiflash_sdk
from openai import OpenAI
from pydantic import BaseModel, Field
from recipe import KEY, MESSAGES, MODEL, URL, report


class Colours(BaseModel):
    """Three of them."""

    names: list[str] = Field(min_length=1, max_length=3)


wrapped = whiflash_sdk.wrap(OpenAI(base_url=URL, api_key=KEY), agent="planner")
client = instructor.from_openai(wrapped, mode=instructor.Mode.JSON_SCHEMA)
with whiflash_sdk.collect(wrapped) as collected:
    client.create(model=MODEL, response_model=Colours, messages=MESSAGES, max_tokens=128, max_retries=0)
report("instructor", "wrap", collected.traces)
