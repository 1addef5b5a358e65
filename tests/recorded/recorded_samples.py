"""Small recorded conversations in the shapes in which others publish theirs, written by hand."""

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


FORMATS: dict[str, Any] = {
    "log": {"id": "one", "category": "support", "messages": MESSAGES, "tools": TOOLS},
    "request": {
        "request": {"model": "m", "messages": MESSAGES[:3], "tools": TOOLS},
        "response": {"choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]},
    },
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
}
"""Each holds the question, the call, its result and the answer."""
