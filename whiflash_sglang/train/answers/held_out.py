"""What "held out" means: no training prompt is about anything that an evaluation prompt is about.

A prompt is about its topics:

user          a simulated user, named anywhere but in the system message; benchmarks of agents give each task one
conversation  the first user turn: a recorded conversation is cut into a prompt for each of its turns
tool          a tool's whole definition, where there is one user turn; longer conversations share their tools by nature
schema        the schema that the answer must fit
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

USERS = r"\b[a-z]+_[a-z]+_\d{4}\b"
"""tau-bench's users, such as mia_li_3668."""

UNNAMED = "unnamed user"
"""Of a conversation that never says whose it is, in a source whose evaluated conversations have users."""

Topic = tuple[str, str]
"""Its kind, and what it is."""


@dataclass(frozen=True)
class Split:
    """kept: the training rows that stay. dropped: how many went, by source and by what they share."""

    kept: list[dict[str, Any]]
    dropped: Counter[tuple[str, str]]


def topics_of(row: dict[str, Any], users: re.Pattern[str]) -> set[Topic]:
    """What a row is about."""
    said = [message for message in row["messages"] if message["role"] != "system"]
    turns = [_text(message) for message in said if message["role"] == "user"]
    topics = {("user", name) for name in users.findall(json.dumps(said))}
    if turns:
        topics.add(("conversation", " ".join(turns[0].split()).casefold()))
    if len(turns) == 1:
        topics |= {("tool", json.dumps(tool, sort_keys=True)) for tool in row.get("tools") or ()}
    if row.get("response_format"):
        topics.add(("schema", json.dumps(row["response_format"], sort_keys=True)))
    return topics


def split(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], users: str = USERS) -> Split:
    """Leave out of `train` what shares a topic with `held_out`.

    A user's conversations belong together, and so do a conversation's prompts, whether or not each of them names the
    user: what one of them shares, all of them share.
    """
    pattern = re.compile(users)
    learned = [topics_of(row, pattern) for row in train]
    evaluated = [topics_of(row, pattern) for row in held_out]
    taken = _grown(set().union(*evaluated), [*learned, *evaluated])
    named = {topic for topics in (*learned, *evaluated) if _of(topics, "user") for topic in topics}
    with_users = {
        _source(row) for row, topics in zip(held_out, evaluated, strict=True) if _of(topics, "user")
    }
    kept, dropped = [], Counter[tuple[str, str]]()
    for row, topics in zip(train, learned, strict=True):
        shared = next(
            (kind for kind in ("user", "conversation", "tool", "schema") if _of(topics & taken, kind)), None
        )
        if shared is None and _source(row) in with_users and not topics & named:
            shared = UNNAMED
        if shared is None:
            kept.append(row)
        else:
            dropped[_source(row), shared] += 1
    return Split(kept, dropped)


def _grown(taken: set[Topic], rows: Sequence[set[Topic]]) -> set[Topic]:
    """`taken`, with the users and conversations that hang together with it."""
    while True:
        linked = taken | {topic for topics in rows if _linking(topics) & taken for topic in _linking(topics)}
        if linked == taken:
            return taken
        taken = linked


def _linking(topics: set[Topic]) -> set[Topic]:
    return {topic for topic in topics if topic[0] in ("user", "conversation")}


def _of(topics: set[Topic], kind: str) -> bool:
    return any(topic[0] == kind for topic in topics)


def _source(row: dict[str, Any]) -> str:
    return str(row.get("source") or row.get("category") or "")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)
