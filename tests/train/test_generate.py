"""Continuous batching gives what generating each prompt alone gives, tokens and features."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from whiflash_sglang.models.target import TargetModel, causal_attention
from whiflash_sglang.train.answers import generate as module
from whiflash_sglang.train.answers.generate import Answer, Generator, GrammarMasks, GroupShape
from whiflash_sglang.train.answers.prompts import GrammarSpec, PromptRow

CAPTURE = [1, 3]
NEW = 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"))


def generate(
    path: Path, prompts: list[PromptRow], dtype: torch.dtype = torch.float32, **options: object
) -> tuple[dict[str, Answer], list[str]]:
    target = TargetModel(path, device=torch.device("cpu"), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    masks = GrammarMasks(tokenizer, target.vocab_size, tokenizer.eos_token_id)
    generator = Generator(
        target,
        masks,
        groups=[GroupShape(3, 48), GroupShape(2, 96)],
        capture=CAPTURE,
        max_new_tokens=NEW,
        eos_id=tokenizer.eos_token_id,
        **options,
    )
    skipped: list[str] = []
    stream: Iterator[PromptRow] = iter(prompts)
    answers = {
        answer.prompt.id: answer
        for answer in generator.run(stream, lambda row, why: skipped.append(f"{row.id}: {why}"))
    }
    return answers, skipped


def random_prompts(count: int) -> list[PromptRow]:
    torch.manual_seed(1)
    lengths = torch.randint(4, 70, (count,)).tolist()
    return [
        PromptRow(f"p{index}", "chat", torch.randint(0, 256, (length,)).tolist(), None)
        for index, length in enumerate(lengths)
    ]


def test_tokens_and_features_equal_a_plain_forward(path: Path) -> None:
    prompts = random_prompts(12)
    answers, skipped = generate(path, prompts, keep_loops=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert not skipped
    assert len(answers) == len(prompts)
    for prompt in prompts:
        answer = answers[prompt.id]
        start = len(prompt.tokens)
        assert answer.tokens[:start] == prompt.tokens
        with torch.no_grad():
            output = model(torch.tensor([answer.tokens[:-1]]), output_hidden_states=True)
        assert output.logits[0, start - 1 :].argmax(-1).tolist() == answer.tokens[start:]
        expected = [output.hidden_states[layer + 1][0] for layer in CAPTURE] + [output.hidden_states[-1][0]]
        torch.testing.assert_close(answer.states, torch.stack(expected, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_in_bfloat16_rows_read_their_own_entries(
    way: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(module, "_compiled", lambda: None)
    elif module._compiled() is None:
        pytest.skip("this machine has no compiled attention")
    answers, _ = generate(path, random_prompts(12), torch.bfloat16, keep_loops=True)
    assert len(answers) == 12
    target = TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
    for answer in answers.values():
        tokens = torch.tensor(answer.tokens[:-1])
        attend = causal_attention(len(tokens), target.device, target.dtype)
        with torch.no_grad():
            final = target.forward(tokens, torch.arange(len(tokens)), attend, CAPTURE).final
        torch.testing.assert_close(answer.states[:, -1].float(), final, rtol=0.05, atol=0.1)


def test_loops_are_cut_unless_kept(path: Path) -> None:
    prompts = random_prompts(8)
    cut, _ = generate(path, prompts)
    kept, _ = generate(path, prompts, keep_loops=True)
    for name, answer in cut.items():
        assert answer.looped == kept[name].looped
        assert kept[name].tokens[: len(answer.tokens)] == answer.tokens
        assert len(answer.states) == len(answer.tokens) - 1
        if not answer.looped:
            assert answer.tokens == kept[name].tokens


def test_a_grammar_is_obeyed(path: Path) -> None:
    import json

    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    prompts = [row._replace(grammar=GrammarSpec("json", schema)) for row in random_prompts(4)]
    answers, _ = generate(path, prompts)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for answer in answers.values():
        text = tokenizer.decode(answer.tokens[len(answer.prompt.tokens) :])
        assert text.startswith("{")


def test_sampling_is_seeded(path: Path) -> None:
    first, again, other = (
        generate(path, random_prompts(4), temperature=1.0, seed=seed)[0]["p0"].tokens for seed in (1, 1, 2)
    )
    assert first == again != other


def test_unusable_prompts_are_reported_and_skipped(path: Path) -> None:
    good = random_prompts(2)
    long = PromptRow("long", "chat", [65] * 90, None)
    broken = PromptRow("broken", "json", [65] * 5, GrammarSpec("json", '{"type": "nonsense"}'))
    answers, skipped = generate(path, [long, good[0], broken, good[1]])
    assert set(answers) == {"p0", "p1"}
    assert sorted(line.split(":")[0] for line in skipped) == ["broken", "long"]


@pytest.mark.parametrize("length", [1, 7, 65])
def test_either_attention_of_a_whole_sequence_is_causal(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU has matrix units torch's fused one, elsewhere products of matrices: the same as far as bf16 tells."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(length, heads, 16).bfloat16() for heads in (6, 2, 2))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.repeat_interleave(3, 1).double()) / 4
    unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    wanted = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(3, 1).double())
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units)
        found = causal_attention(length, q.device, q.dtype)(0, q, k, v)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-6, atol=2**-6)
