"""Small recorded conversations in the shapes in which others publish theirs, written by hand."""

import json
from typing import Any

ASK = {"role": "user", "content": "Which flights do I have?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"user": "mia_li_3668"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "find", "content": '{"flight": "HAT136"}'}
ANSWER = {"role": "assistant", "content": "You are on flight HAT136."}
MESSAGES = [ASK, CALL, RESULT, ANSWER]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"user": {"type": "string"}},
                "required": ["user"],
            },
        },
    }
]


def _said(name: str, arguments: dict[str, Any], text: str, call: str) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    message = {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"id": call, "type": "function", "function": function}],
    }
    return {
        "function_name": name,
        "tool_call_id": call,
        "model_response": {"id": f"r-{call}", "choices": [{"index": 0, "message": message}]},
        "total_calls_in_response": 1,
    }


FORMATS: dict[str, Any] = {
    "log": {"id": "one", "category": "support", "messages": MESSAGES, "tools": TOOLS},
    "request": {
        "request": {"model": "m", "messages": MESSAGES[:3], "tools": TOOLS},
        "response": {"choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]},
    },
    "tau-bench": {"task_id": 3, "trial": 1, "reward": 1.0, "info": {"task": {}}, "traj": MESSAGES},
    "tau2": {
        "info": {"environment_info": {"domain_name": "airline", "policy": "Be kind.", "tool_defs": None}},
        "tasks": [],
        "simulations": [
            {
                "task_id": "3",
                "trial": 1,
                "messages": [
                    {**ASK, "tool_calls": None, "turn_idx": 0},
                    {"role": "user", "content": None, "tool_calls": [{"name": "look", "requestor": "user"}]},
                    {"id": "u1", "role": "tool", "content": "seen", "requestor": "user"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "c1", "name": "find", "arguments": {"user": "mia_li_3668"}}],
                    },
                    {"id": "c1", "role": "tool", "content": RESULT["content"], "requestor": "assistant"},
                    {**ANSWER, "tool_calls": None},
                ],
            }
        ],
    },
    "bfcl": {
        "id": "multi_turn_base_0",
        "result": [[[{"find": '{"user": "mia_li_3668"}'}], "You are on flight HAT136."]],
        "inference_log": [
            [{"role": "state_info", "class_name": "TravelAPI", "content": {}}],
            {
                "begin_of_turn_query": [ASK],
                "step_0": [
                    {"role": "assistant", "content": [{"find": '{"user": "mia_li_3668"}'}]},
                    {"role": "handler_log", "content": "Successfully decoded model response."},
                    {"role": "tool", "content": '{"flight": "HAT136"}'},
                ],
                "step_1": [
                    {
                        "role": "assistant",
                        "content": "You are on flight HAT136.",
                        "reasoning_content": "RoundResult.",
                    },
                    {"role": "handler_log", "content": "Error decoding the model response.", "error": "x"},
                ],
            },
            [{"role": "state_info", "class_name": "TravelAPI", "content": {}}],
        ],
    },
    "swe-agent": {
        "environment": "main",
        "trajectory": [],
        "history": [
            {**ASK, "agent": "main"},
            {**CALL, "agent": "main", "thought": "", "action": "find mia_li_3668"},
            {
                "role": "tool",
                "content": [{"type": "text", "text": RESULT["content"]}],
                "tool_call_ids": ["c1"],
            },
            {**ANSWER, "agent": "main", "thought": "", "action": ""},
        ],
        "info": {"exit_status": "submitted"},
    },
    "mini-swe-agent": {
        "info": {"exit_status": "Submitted"},
        "messages": [*MESSAGES, {"role": "exit", "content": "", "extra": {}}],
        "trajectory_format": "mini-swe-agent-1.1",
        "instance_id": "repository__repository-1",
    },
    "openhands": {
        "instance_id": "repository__repository-2",
        "history": [
            {"id": 0, "source": "agent", "action": "system", "args": {"content": "Help.", "tools": TOOLS}},
            {"id": 1, "source": "user", "action": "message", "args": {"content": ASK["content"]}},
            {"id": 2, "source": "environment", "observation": "agent_state_changed", "content": ""},
            {
                "id": 3,
                "source": "agent",
                "action": "run",
                "args": {},
                "tool_call_metadata": _said("find", {"user": "mia_li_3668"}, "", "c1"),
            },
            {
                "id": 4,
                "source": "environment",
                "observation": "run",
                "content": RESULT["content"],
                "cause": 3,
                "tool_call_metadata": _said("find", {"user": "mia_li_3668"}, "", "c1"),
            },
            {"id": 5, "source": "agent", "action": "message", "args": {"content": ANSWER["content"]}},
        ],
    },
}
"""Each holds the question, the call, its result and the answer."""
