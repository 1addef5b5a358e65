"""Recorded messages become the tokens of prompts and answers."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_target
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_lab.conversations import Renderer, call, conversation
from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.errors import ConfigError

SOURCE = "class A:\n    return self.value + 1\n"
SPOKEN = conversation(
    "here",
    "one",
    "agents",
    [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": f"Mend this:\n{SOURCE}"},
        {"role": "assistant", "content": "So:\n```\nx = 1\n```\n", "reasoning": "Let me see"},
        {"role": "user", "content": "Write it."},
        {
            "role": "assistant",
            "content": "I will.",
            "tool_calls": [call("write", '{"path":"new.py"}'), call("done", "{}")],
        },
        {"role": "tool", "content": "written"},
        {"role": "assistant", "content": "RoundResult. I will."},
    ],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    target: Path = tiny_target(tmp_path_factory.mktemp("recorded") / "target")
    return AutoTokenizer.from_pretrained(target)


def test_turns_are_the_template_s(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = list(Renderer(tokenizer, (embedded_bundle() / "chat_template.jinja").read_text()).turns(SPOKEN))
    assert tokenizer.decode(turns[0].prompt).endswith(f"{SOURCE}<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(turns[2].prompt).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")
    thought, called, said = (tokenizer.decode(turn.answer) for turn in turns)
    assert thought == "<think>\nLet me see\n</think>\n\nSo:\n```\nx = 1\n```\n<|im_end|>"
    assert called.startswith('I will.\n<tool_call>\n{"name": "write", "arguments": {"path": "new.py"}}\n')
    assert said == "RoundResult. I will.<|im_end|>"
    for turn in turns:
        whole = tokenizer.encode(tokenizer.decode(turn.prompt), add_special_tokens=False)
        assert turn.prompt == whole, "tokens that are kept from turn to turn are those of the whole prompt"


def test_a_template_that_renders_answers_elsewhere_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="one, answer 2: the chat template does not render"):
        list(Renderer(tokenizer, template).turns(SPOKEN))
    for template in ("{{ raise_exception('no tools') }}", "{{ messages | sum }}"):
        with pytest.raises(ConfigError, match="one: the chat template refuses its messages"):
            list(Renderer(tokenizer, template).turns(SPOKEN))
    spoken = replace(SPOKEN, tools=({"function": {"name": "f", "description": 1}},))
    with pytest.raises(ConfigError, match=r"one: SGLang refuses a tool: function\.description: Input should"):
        list(Renderer(tokenizer).turns(spoken))
