"""`whiflash check --recipe`: launches that other people published, judged by their flags."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_app import serving
from loaded_scripts import load_script
from typer.testing import CliRunner

from whiflash_lab.recipes import judge as judge_module
from whiflash_lab.recipes.files import Recipe, read
from whiflash_lab.recipes.judge import judge
from whiflash_lab.recipes.rewrite import judged
from whiflash_lab.recipes.verdicts import verdicts_in
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError, UsageError

PUBLISHED = Path(__file__).parents[2] / "tests" / "data" / "agent_recipes.jsonl"
STARTING = 35
"""Recipes that WHIFLASH would start. They may grow only."""
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


def published() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PUBLISHED.read_text().splitlines()]


@pytest.mark.newest
def test_recipes_that_others_published() -> None:
    """If a rule went, correct the obstacles in the file and raise `STARTING`."""
    verdicts = [judge(recipe["flags"]) for recipe in published()]
    found = [list(verdict.obstacles) for verdict in verdicts]
    for recipe, obstacles in zip(published(), found, strict=True):
        assert obstacles == recipe["obstacles"], recipe["recipe"]
    assert len(found) == 52
    replaced = [sentence for verdict in verdicts for sentence in verdict.replaced if "flashinfer" in sentence]
    assert [said.split(" (")[0] for said in replaced] == ["--attention-backend flashinfer is replaced by triton"] * 2
    assert sum(not obstacles for obstacles in found) == STARTING


LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
INDEX = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
COMPRESSED = {"compress_ratios": [4] * 4, "head_dim": 16, "qk_rope_head_dim": 8, "sliding_window": 32}
COMPRESSED |= {"index_head_dim": 16}
LINEAR = {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 16}
BY_TARGET: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    # Words in a recipe's name; how many of them start on a target of this kind.
    "Qwen3_5MoeForConditionalGeneration": (("qwen3.5",), 22, {"text_config": {**SIZES, **LINEAR}, "vision_config": {}}),
    "GlmMoeDsaForCausalLM": (("glm5.2",), 0, {**SIZES, **LATENT, **INDEX, "max_position_embeddings": 1 << 20}),
    "DeepseekV4ForCausalLM": (("deepseek-v4", "dsv4"), 0, {**SIZES, **COMPRESSED}),
}
KINDS = {"Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe", "GlmMoeDsaForCausalLM": "glm_moe_dsa"}


@pytest.mark.newest
@pytest.mark.parametrize("architecture", BY_TARGET)
def test_recipes_on_their_targets(write: Write, tmp_path: Path, architecture: str) -> None:
    """By flags and by the class that they are for. If a target's rule went, raise the number."""
    words, starting, config = BY_TARGET[architecture]
    kind = {"architectures": [architecture], "model_type": KINDS.get(architecture, "llama"), "torch_dtype": "bfloat16"}
    write("config.json", json.dumps({**kind, **config}))
    asked = [recipe["flags"] for recipe in published() if any(word in recipe["recipe"] for word in words)]
    assert sum(judge(flags, target=tmp_path).starts for flags in asked) == starting


def test_flags_of_other_algorithms_are_replaced() -> None:
    verdict = judge({"speculative-algorithm": "NEXTN", "speculative-num-steps": "3", "speculative-adaptive": ""})
    assert verdict.starts
    assert [sentence.split(" is ")[0] for sentence in verdict.replaced] == [
        "--speculative-algorithm NEXTN",
        "--speculative-num-steps",
        "--speculative-adaptive",
    ]
    assert "--whiflash-eagle-steps" in verdict.replaced[1]
    ours = judge({"speculative-algorithm": "WHIFLASH", "speculative-num-steps": "3"})
    assert list(ours.obstacles) == ["other_algorithms"]


@pytest.mark.parametrize(
    ("flags", "obstacles"),
    [
        ({"tp": "8", "dp-size": "2"}, []),
        ({"pp-size": "1", "pipeline_parallel_size": "2"}, ["pp_size"]),
        ({"--pp-size": ""}, ["pp_size"]),  # a variable
        ({"--pp-size": "1"}, []),
        ({"enable-lora": "false"}, []),
        ({"enable-lora": "True"}, []),
        ({"lora-paths": ["one=a", "two=b"], "lora-backend": "torch_native"}, ["lora_backend"]),
        ({"lora-paths": ["one=a", "two=b"], "lora-backend": "triton"}, []),
        ({"lora-paths": ["one=a"], "device": "cpu"}, []),
        ({"enable-dp-attention": ""}, []),  # of one rank
        ({"enable-dp-attention": "", "dp": ""}, []),
        ({"attention-backend": ""}, []),
        ({"attention-backend": "flashmla"}, ["cuda_attention"]),
        ({"device": "xpu"}, ["device"]),
        ({"device": "cpu"}, []),
        ({"device": "cpu", "attention-backend": "triton"}, ["cpu_attention"]),
        ({"enable-multimodal": ""}, []),  # the target's class decides
        ({"enable-multimodal": "", "disaggregation-mode": "decode"}, ["multimodal_roles"]),
        ({"swa-full-tokens-ratio": "0.1"}, []),
        ({"cuda-graph-backend-prefill": "full"}, ["cuda_prefill_graphs"]),
        ({"disable-cuda-graph-padding": "true"}, ["cuda_graph_padding"]),
        ({"disable-cuda-graph-padding": "true", "disable-cuda-graph": "true"}, []),
        ({"enable-hierarchical-cache": "", "whiflash-drafters": "none"}, []),
        ({"whiflash-router": "auto", "trust-remote-code": ""}, []),
        ({"whiflash-router": "fastest"}, ["--whiflash-router"]),
        ({"never-heard": "1"}, ["--never-heard"]),
        ({"tp-size": "four", "pp-size": "2"}, ["--tp-size", "pp_size"]),
        ({"enable-lora": "yes"}, ["--enable-lora"]),
        ({"tp-size": ["1", "2"]}, ["--tp-size"]),
        ({"enable-metrics": ["1"]}, ["--enable-metrics"]),
    ],
)
def test_flags(flags: dict[str, Any], obstacles: list[str]) -> None:
    verdict = judge(flags)
    assert list(verdict.obstacles) == obstacles
    assert not any("\n" in sentence or "{" in sentence for sentence in verdict.obstacles.values())


def test_no_code_of_the_target_is_run(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own", "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "nothing of it is run here" in "".join(judge({"model-path": str(tmp_path), "trust-remote-code": ""}).unread)
    assert not (tmp_path / "ran").exists()


def test_variables_are_read_or_named() -> None:
    assert "--attention-backend, whose value is a variable" in judge({"attention-backend": ""}).unread
    assert list(judge({}, {"SGLANG_RUST_SERVER": "1"}).obstacles) == ["rust_server"]


@pytest.mark.parametrize(
    ("architecture", "model_type", "obstacles"),
    [("LlamaForCausalLM", "llama", []), ("FalconH1ForCausalLM", "falcon_h1", ["recurrent", "uncaptured"])],
)
def test_the_target_counts_if_it_is_there(
    write: Write, tmp_path: Path, architecture: str, model_type: str, obstacles: list[str]
) -> None:
    config = {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **SIZES}
    write("config.json", json.dumps(config))
    for verdict in (judge({}, target=tmp_path), judge({"model-path": str(tmp_path)})):
        assert list(verdict.obstacles) == obstacles
        assert not verdict.unread
    for elsewhere in ("owner/name", "x" * 5000):
        assert f"add --model-path {elsewhere}" in judge({"model-path": elsewhere}).unread[0]


SCRIPT = """#!/usr/bin/env bash
# sglang serve earlier/model (see the handbook)
export SGLANG_ENABLE_SPEC_V2=1
TP=2
SIZE=10
[ "$BIG" = yes ] && SIZE=20
CACHE=()
if [ "$OFFLOAD" = yes ]; then
    CACHE=(--page-size 64 --enable-hierarchical-cache)
    CACHE+=(--hicache-size "$SIZE")
fi
ALL=("${CACHE[@]}" --stream-interval 50)
COMMAND=(
    python3 -m sglang.launch_server
    --model-path="$MODEL" --tp "$TP"
    # --pp-size 2
    --trust-remote-code  # ours
    --dist-init-addr "127.0.0.1:$((PORT + 1))"
    "${ALL[@]}"
)
"${COMMAND[@]}" > log 2>&1 &
"""
IN_THE_SCRIPT = {
    "model-path": "$MODEL",
    "tp": "2",
    "trust-remote-code": "",
    "dist-init-addr": "127.0.0.1:$((PORT + 1))",
    "page-size": "64",
    "enable-hierarchical-cache": "",
    "hicache-size": "$SIZE",
    "stream-interval": "50",
}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 3000,
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": [1]}',
    ],
)
def test_a_target_that_sglang_cannot_read_is_named(write: Write, text: str) -> None:
    directory = write("config.json", text).parent
    with pytest.raises(ConfigError, match=f"SGLang cannot read {directory}/config.json: "):
        judge({"model-path": str(directory)})


def test_reading_shell(write: Write) -> None:
    script = write("serve.sh", SCRIPT)
    start = "python3 -m sglang.launch_server"
    assert read(script) == [Recipe(str(script), IN_THE_SCRIPT, {"SGLANG_ENABLE_SPEC_V2": "1"}, start)]
    line = "A=b SGLANG_RUST_SERVER=1 sglang serve owner/name \\\n --tp 2 --lora-paths 'a=b' c=d | tee log\necho done"
    found = read(write("line", line))[0]
    assert found.flags == {"model-path": "owner/name", "tp": "2", "lora-paths": ["a=b", "c=d"]}
    assert found.environment == {"SGLANG_RUST_SERVER": "1"}
    assert read(write("flags", "--tp=2\n--enable-metrics"))[0].flags == {"tp": "2", "enable-metrics": ""}
    (variable,) = read(write("a.env", "HF_TOKEN=x\nSGLANG_RUST_SERVER=1\nSGLANG_ARGS='--model-path a/b --tp 2'\n"))
    assert (variable.flags, variable.environment) == ({"model-path": "a/b", "tp": "2"}, {"SGLANG_RUST_SERVER": "1"})
    two = read(write("two", "sglang serve a/b --tp 1\nwhiflash serve --tp 2\n"))
    assert [recipe.flags.get("tp") for recipe in two] == ["1", "2"]
    begun = 'echo "it\'s up"; sglang serve a/b --tp 2'
    for line in ("sglang serve a/b --tp 2 2>&1 | tee log", 'bash -c "sglang serve a/b --tp 2"', begun):
        assert read(write("line", line))[0].flags == {"model-path": "a/b", "tp": "2"}
    line = "export M='a b'; N=$M\nQ=x/$R\nuv run sglang serve \"$M\" '$M' --tp ${TP:-4} --host $Q"
    (filled,) = read(write("line", line))
    assert filled.flags == {"model-path": ["a b", "$M"], "tp": "4", "host": "x/$R"}
    assert filled.start == "uv run sglang serve"


@pytest.mark.parametrize(
    "around",
    [
        "pkill -f sglang.launch_server || true\n{}",
        "sudo pkill -f 'python3 -m sglang.launch_server --port 1'\n{}",
        "if ! pgrep -f 'sglang serve' >/dev/null; then {}; fi",
        'log "starting sglang serve on $PORT"; {}',
        "{}  # then sglang serve MODEL",
        "cat >&2 <<EOF\nusage, if it's new:\n sglang serve m --tp 1\nEOF\n{}",
        "USAGE=$(cat <<-EOF\n\tdon't\n\tsglang serve m --tp 1\n\tEOF\n)\n{}",
        "sglang serve --help | head; {}",
        "ID=$(docker run -d image {})",
        "COMMAND=(nohup sglang serve)\nCOMMAND+=(a/b --tp 2)\n${{COMMAND[@]}}",
        "sglang serve a/b >log --tp 2",
    ],
)
def test_a_launch_is_a_command_that_a_shell_runs(write: Write, around: str) -> None:
    (recipe,) = read(write("serve.sh", around.format("sglang serve a/b --tp 2")))
    assert recipe.flags == {"model-path": "a/b", "tp": "2"}


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("B=1; export SGLANG_A=$B C='x'; sglang serve a/b", ["SGLANG_A=1 sglang serve"]),
        ('export SGLANG_A="x y"\nsglang serve a/b', ["SGLANG_A='x y' sglang serve"]),
        ("export SGLANG_A=$(hostname -I)\nsglang serve a/b", ["sglang serve"]),
        ("SGLANG_A=$B sglang serve a/b", ["SGLANG_A=$B sglang serve"]),
        ("SGLANG_A=1 sglang serve m &\nsglang serve a/b", ["SGLANG_A=1 sglang serve", "sglang serve"]),
        ("(export SGLANG_A=1; sglang serve m) &\nsglang serve a/b", ["SGLANG_A=1 sglang serve", "sglang serve"]),
        ("export SGLANG_A=1\nunset SGLANG_A\nsglang serve a/b", ["sglang serve"]),
        ("docker run -e SGLANG_RUST_SERVER=1 i sglang serve a/b", ["docker run i sglang serve"]),
    ],
)
def test_a_launch_has_the_variables_that_reach_it(write: Write, text: str, starts: list[str]) -> None:
    commands = [judged(recipe).command.splitlines() for recipe in read(write("serve.sh", text))]
    assert [lines[0] for lines in commands] == [f"{start} \\" for start in starts]
    assert ("# set before, as in your file: SGLANG_A" in commands[0]) == ("hostname" in text)


def test_reading_containers(write: Write) -> None:
    with pytest.raises(UsageError, match="holds no launch"):
        read(write("compose.yaml", "services: {a: {image: b}}"))
    words = "command: [python3, -m, sglang.launch_server], args: [--model-path, a/b, --tp=2, --api-key, $(K)]"
    text = f"apiVersion: v1\nspec: {{containers: [{{name: s, {words}}}, {{name: other, command: [ls]}}]}}"
    start, keys = "python3 -m sglang.launch_server", ("command", "args")
    flags = {"model-path": "a/b", "tp": "2", "api-key": "$(K)"}
    for pod in (write("pod.yaml", text), write("apply.sh", f"kubectl apply -f - <<EOF\n{text}\nEOF\n")):
        assert read(pod) == [Recipe(f"{pod}: s", flags, {}, start, keys)]
    whole = "services:\n  s:\n    environment: [SGLANG_RUST_SERVER=1, A=b]\n    command: sglang serve a/b --tp 2"
    compose = write("compose.yaml", whole)
    words_of = {"model-path": "a/b", "tp": "2"}
    keys = ("command", "command")
    assert read(compose) == [Recipe(f"{compose}: s", words_of, {"SGLANG_RUST_SERVER": "1"}, "sglang serve", keys)]
    text = "apiVersion: v1\nspec: {command: [bash, -c], args: ['cd x; sglang serve a/b --tp 2 | tee log']}"
    shell = write("shell.yaml", text)
    assert [(recipe.flags, recipe.name, recipe.keys) for recipe in read(shell)] == [(words_of, f"{shell}: spec", ())]
    script = "set -e\nP=1\nexec sglang serve a/b --tp $(TP) --port ${P:-2} \\\n --host $P | tee log"
    of_env = {"command": ["sh", "-c", script], "env": [{"name": "SGLANG_ENABLE_SPEC_V2", "value": "1"}]}
    inside, said = command(write, f"apiVersion: v1\nspec: {json.dumps(of_env)}", "pod.yaml")
    words_of_it = "--model-path a/b --tp $(TP) --port ${P:-2} --host $P --speculative-algorithm WHIFLASH"
    assert inside == f"exec sglang serve {words_of_it}", "one line, with the container's variables"
    assert "takes the place of the launch in the container's script" in "".join(said)
    for text, said in (
        ("services: {a: {command: 7}}", "holds no launch"),
        ("services: {a: {image: lmsysorg/sglang, args: [--model-path, a/b]}}", "a has no command"),
    ):
        with pytest.raises(UsageError, match=said):
            read(write("compose.yaml", text))
    merged = (
        "x-s: &s {image: lmsysorg/sglang, entrypoint: python3 -m sglang.launch_server}\n"
        "services: {a: {<<: *s, command: --model-path a/b}, b: {<<: *s, entrypoint: sglang, command: [serve, c/d]}}"
    )
    of_merged = [(recipe.start, recipe.flags, recipe.keys) for recipe in read(write("compose.yaml", merged))]
    keys = ("entrypoint", "command")
    assert of_merged == [(start, {"model-path": "a/b"}, keys), ("sglang serve", {"model-path": "c/d"}, keys)]
    named = "services: {a: {environment: SGLANG_X=1, command: sglang serve a/b --tp 2}}"
    assert read(write("compose.yaml", named))[0].environment == {"SGLANG_X": "1"}


def test_reading_yaml_and_json(write: Write) -> None:
    plain = read(write("flags.yaml", "tp-size: 2\nenable-metrics: true\nlora-paths: [a, b]\nadmin-api-key:\n"))
    assert plain[0].flags == {"tp-size": "2", "enable-metrics": "true", "lora-paths": ["a", "b"], "admin-api-key": ""}
    roles = {"prefill": {"tp-size": 8}, "decode": {"tp-size": 4}}
    backend = {"sglang_config": roles, "decode_environment": {"SGLANG_RUST_SERVER": 1}}
    file = write("roles.yml", json.dumps({"base": {"backend": backend}, "override": {}}))
    assert read(file) == [
        Recipe(f"{file}: prefill", {"tp-size": "8"}),
        Recipe(f"{file}: decode", {"tp-size": "4"}, {"SGLANG_RUST_SERVER": "1"}),
    ]
    dated = read(write("dated.yaml", "preferred-sampling-params: {since: 2026-01-01}"))
    assert dated[0].flags == {"preferred-sampling-params": '{"since": "2026-01-01"}'}
    lines = write("some.jsonl", '{"recipe": "one", "flags": {"tp-size": 2}}\n{"tp-size": 3}\n')
    assert read(lines) == [Recipe("one", {"tp-size": "2"}), Recipe(str(lines), {"tp-size": "3"})]


def nested(value: str) -> str:
    """Ten names: each is a `value` that holds the one before nine times."""
    names = pairwise("abcdefghij")
    lines = (f"{name}: &{name} " + value.format(", ".join([f"*{held}"] * 9)) for held, name in names)
    return "\n".join(["a: &a {x: 1}", *lines])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.sh", "echo done", "holds no launch"),
        ("a.sh", "", "holds no launch"),
        ("a.json", "{}", "holds no launch"),
        ("a.sh", "vllm serve m --tp 2", "launches vLLM"),
        ("a.sh", "sglang serve --host 'a", "is not a shell line: No closing quotation"),
        ("a.sh", 'sglang serve "${A[@]}" --model-path a/b', "may hold any flags"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "- a", "flags and values expected"),
        ("a.json", "[1]", "flags and values expected"),
        ("a.json", '{"a": 1', "is not JSON"),
        ("a.json", '{"flags": 1}', "flags and values expected"),
        ("a.json", '{"flags": {"tp-size": 2}, "environment": [1]}', "flags and values expected"),
        ("a.yaml", "sglang_config: {prefill: {tp-size: 2}}\nprefill_environment: [1]", "flags and values expected"),
        ("a.json", '{"a":' * 3000, "cannot be read"),
        ("a.json", f'{{"a": {"9" * 5000}}}', "cannot be read"),
        ("a.yaml", "[" * 3000, "nested too deeply"),
        ("a.yaml", f"a: {'9' * 5000}", "is not YAML|cannot be read"),
        ("a.yaml", "a: &a {b: *a}", "holds itself"),
        ("a.yaml", "a: &a {b: [*a]}", "holds itself"),
        ("a.yaml", nested("[{}]"), "comes to more than"),
        ("a.yaml", nested("{{<<: [{}]}}"), "comes to more than"),
        ("a.yaml", f"a: &a {'x' * 100_000}\nb: [{'*a, ' * 2000}]", "comes to more than"),
        ("a.yaml", "a: 1" + ":1" * 3000 + ".5", "is not YAML"),
        ("a.yaml", "a: !!bool x", "is not YAML"),
        ("a.sh", f"A={'x' * 8000}\nsglang serve m {'$A ' * 9}", "a launch of more than"),
        ("a.sh", "\n" * 200_000, "holds no launch"),
        ("a.sh", "$((" * 80_000, "holds no launch"),
        ("a.sh", "sglang serve m\n" * 10_000, "more than 1000 launches"),
        ("a.json", "{}" * 100_000, "more than 1000 launches"),
        ("a.sh", "x" * 2**20, "at most 262144 are read"),
    ],
)
def test_files_that_are_no_recipes_end_soon(write: Write, name: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        read(write(name, text))
    assert "\n" not in str(error.value)


def command(write: Write, text: str, name: str = "serve.sh") -> tuple[str, list[str]]:
    """The new command of a file's only launch, and the comments behind it."""
    (recipe,) = read(write(name, text))
    lines = judged(recipe).command.splitlines()
    new = "\n".join(line for line in lines if not line.startswith("#"))
    if recipe.keys is None and new:
        assert judged(read(write("new.sh", new))[0]).starts, "it is a launch that starts"
    return new, [line for line in lines if line.startswith("#")]


def test_the_new_command_is_whole(write: Write) -> None:
    """Launches as people publish them."""
    new, said = command(
        write,
        "SGLANG_RUST_SERVER=1 docker run -p 1:1 image python3 -m sglang.launch_server --model a/b --speculative-algo "
        "EAGLE3 --speculative-draft-model-path c/d --speculative-num-steps 3 --mem-fraction 0.7 --api-key $KEY "
        "--mamba-scheduler-strategy extra_buffer --enable-ep-moe --tp 4 --pp-size 2 > log",
    )
    assert new.split(" \\\n    ") == [
        "docker run -p 1:1 image python3 -m sglang.launch_server",
        "--model a/b",
        "--speculative-draft-model-path c/d",
        "--mem-fraction 0.7",
        "--api-key $KEY",
        "--mamba-radix-cache-strategy extra_buffer",
        "--ep-size 4",
        "--tp 4",
        "--speculative-algorithm WHIFLASH",
    ]
    for part in (
        "# --speculative-algorithm EAGLE3 is replaced by WHIFLASH",
        "# --speculative-num-steps is replaced by --whiflash-eagle-steps",
        "# --mamba-scheduler-strategy is --mamba-radix-cache-strategy now",
        "# --enable-ep-moe is --ep-size <tp-size> now",
        "unset SGLANG_RUST_SERVER",
        "--pp-size must be 1",
    ):
        assert any(part in line for line in said), part
    plain, said = command(write, "sglang serve Qwen/Qwen3-8B --dp-size 2")
    parts = ["sglang serve", "--model-path Qwen/Qwen3-8B", "--dp-size 2", "--speculative-algorithm WHIFLASH"]
    assert plain.split(" \\\n    ") == parts
    assert "whiflash bundle create --target Qwen/Qwen3-8B --eagle3 deepseek-ai/" in said[0]
    assert "at most 48 requests" in said[1]
    pod = "apiVersion: v1\nspec: {command: [sglang, serve], args: [--model-path, a/b, --host, '0.0.0.0']}"
    listed, _ = command(write, pod, "pod.yaml")
    first, further = listed.splitlines()
    assert first == 'command: ["sglang", "serve"]'
    assert json.loads(further.removeprefix("args: "))[-2:] == ["--speculative-algorithm", "WHIFLASH"]
    assert command(write, "sglang serve a/b --device xpu")[0] == "", "there is none"
    switches, _ = command(write, "model-path: a/b\nenable-metrics: true\nenable-lora: false\ntp-size: 2", "flags.yaml")
    assert switches.splitlines()[2:4] == ["    --enable-metrics \\", "    --tp-size 2 \\"]
    kept, _ = command(write, "sglang serve a/b --dp-size 2 --enable-dp-attention --lora-paths a=b")
    assert ("--enable-dp-attention" in kept, "lora" in kept) == (True, False), "what the sentence says to remove"
    without, _ = command(write, "sglang serve a/b --enable-torch-compile --attention-backend flashinfer")
    assert "torch-compile" not in without
    assert "flashinfer" not in without


IMAGE = "docker run -e 'NOTE=a;b' -v \"$HOME/my cache:/c\" image"
MODEL, OURS = "sglang serve a/b", "--speculative-algorithm WHIFLASH"


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ('A=(--model-path a/b --json-model-override-args \'{"a": "b(c)"}\')\nsglang serve "${A[@]}"', "", "b(c)"),
        ("A=(\n --model-path a/b  # the (small) one's\n --tp 2\n)\nsglang serve ${A[@]} --port 1", "", "--tp 2"),
        (f'{MODEL} --log-level info $MORE "$@"', "", f'info \\\n    $MORE "$@" \\\n    {OURS}'),
        (f"{MODEL} --trust-remote-code $MORE", "", f"--trust-remote-code \\\n    $MORE \\\n    {OURS}"),
        (f'{MODEL} --trust-remote-code "${{MORE[@]}}"', "", f'    "${{MORE[@]}}" \\\n    {OURS}'),
        (f'{MODEL} --speculative-algorithm EAGLE3 --speculative-num-steps 3 "$@"', "", f'    "$@" \\\n    {OURS}'),
        (f"{MODEL} --port $PORT --pp-size 1 $MORE", "", "--port $PORT \\\n    --pp-size 1 \\\n"),
        (f'{MODEL} --port $PORT "$@"', "", "--port $PORT \\\n"),
        (f"{MODEL} --disable-piecewise-cuda-graph $MORE", "", "# not judged: the flags in $MORE"),
        (f"{MODEL} --api-key 'pa$$word' --log-level=\"$L\"", "", "--api-key 'pa$$word' \\\n    --log-level \"$L\""),
        (f"{MODEL} --file-storage-path `mktemp -d`", "", "--file-storage-path `mktemp -d`"),
        (f"{IMAGE} {MODEL} --tp 2", IMAGE, "--tp 2"),
        ('bash -c "x && sglang serve a/b --served-model-name \\"a b\\" --tp 2"', "", '"a b"'),
        (f"[Service]\nExecStart=/bin/{MODEL}", "/bin/sglang serve", "a/b"),
        (f'docker run image bash -c "x && {MODEL}"', "sglang serve", "the image must hold WhiFlash"),
        (f"P=1\nP=2\n{MODEL} --port $P", "", "# set before, as in your file: P"),
        (f"cat > a.sh <<EOF\n{MODEL} --tp \\$TP \\\\\n --port 1\nEOF\n", "", "--tp $TP \\\n    --port 1"),
        (f"cat > a.sh <<'EOF'\n{MODEL} --api-key a\\$b\nEOF\n", "", "--api-key a\\$b"),
        (f"{MODEL} --json-model-override-args '{{\n \"a\": 1}}' --tp 2", "", "'{\n \"a\": 1}' \\\n    --tp 2"),
        (f"{MODEL} --chat-template $(dirname $(pwd))/t --tp 2", "", "$(dirname $(pwd))/t \\\n    --tp 2"),
        (f'O=\'{{"a": 1}}\'\n{MODEL} --json-model-override-args "$O"', "", "'{\"a\": 1}'"),
        (
            f"{MODEL} --speculative-algorithm STANDALONE --speculative-draft-model-path c/d",
            "",
            "WHIFLASH reads no drafter",
        ),
    ],
)
def test_a_word_is_printed_as_it_was_written(write: Write, text: str, start: str, words: str) -> None:
    new, said = command(write, text)
    assert new.startswith(f"{start} " if start else "")
    assert words in "\n".join([new, *said])
    assert ("--model-path a/b" in new, "c/d" in new) == (True, False)


def test_the_flags_of_a_config_file_count(write: Write) -> None:
    """They are written out, and the command line's own come first."""
    script = write("serve.sh", "sglang serve --config flags.yaml --tp 4\n")
    ((name, alone),) = verdicts_in(script, None)
    assert "the flags in flags.yaml: whiflash check --recipe flags.yaml judges them" in alone.command
    flags = write("flags.yaml", "model-path: a/b\ntp: 2\nspeculative-algorithm: EAGLE3\nspeculative-num-steps: 3\n")
    ((name, verdict),) = verdicts_in(script, None)
    assert name == f"{script} with {flags}"
    words = ["sglang serve", "--model-path a/b", "--tp 4", "--speculative-algorithm WHIFLASH"]
    assert [line for line in verdict.command.splitlines() if line[0] != "#"] == " \\\n    ".join(words).splitlines()


@pytest.mark.parametrize("text", ["sglang serve --port 1", f"{MODEL} --tp two"])
def test_there_is_no_command_without_a_model_or_with_a_value_that_is_wrong(write: Write, text: str) -> None:
    assert command(write, text)[0] == ""


def test_flags_of_earlier_releases_have_their_names_of_today(write: Write) -> None:
    parser = judge_module.parser_of_sglang()
    for old, new in judge_module.RENAMED.items():
        name, *value = new.replace("<tp-size>", "2").split()
        action = parser.meant(name)
        assert action is not None, name
        given = [] if value or action.nargs == 0 else [str((action.choices or [8])[0])]
        assert parser.fields([name, *value, *given]), "SGLang takes it"
        _, said = command(write, f"sglang serve a/b --tp 2 {' '.join([old, *given])}")
        assert f"# {old} is {new} now" in said


def test_what_sglang_refuses_is_its_refusal(write: Write) -> None:
    for flags, said in (
        ("--cuda-graph-max-bs 8", "it is --cuda-graph-max-bs-decode now"),
        ("--tool-call-parsr x", "did you mean --tool-call-parser"),
        ("--never-heard 1", "--never-heard is no flag of SGLang 0.5.23; remove it"),
    ):
        (recipe,) = read(write("serve.sh", f"sglang serve a/b {flags}"))
        verdict = judged(recipe)
        assert verdict.foreign == verdict.obstacles.keys()
        assert said in str(verdict.obstacles)
    shown = CliRunner().invoke(app, ["check", "--recipe", str(write("serve.sh", "sglang serve a/b --never-heard 1"))])
    assert "refused by SGLang itself as it is; starts as below" in shown.output.splitlines()[0]


@pytest.mark.newest
def test_the_table_of_flags_is_sglangs() -> None:
    """And what a start makes of flags that stand for others is what SGLang makes of them."""
    from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.arg_groups.parallel_hook import handle_deprecated_dp_attention
    from sglang.srt.server_args import ServerArgs

    upstream = load_script("upstream")
    # In a process of its own: what other tests register in SGLang would be among a flag's choices.
    alone = [sys.executable, "-c", "import upstream; print(upstream.server_flags(), end='')"]
    told = subprocess.run(alone, cwd=upstream.__file__.rpartition("/")[0], capture_output=True, text=True, check=True)
    assert told.stdout.endswith(upstream.FLAGS.read_text("utf-8")), "python scripts/upstream.py --record writes it"
    for fields in (
        {},
        {"disable_cuda_graph": True},
        {"disable_prefill_cuda_graph": True, "dp_size": 2, "enable_dp_attention": True},
        {"cuda_graph_config": {"decode": {"backend": "disabled"}}, "cuda_graph_backend_decode": "full"},
    ):
        ours = judge_module._launch(fields, {}, None)[0].args
        theirs = ServerArgs(model_path="none", **fields)
        handle_deprecated_dp_attention(theirs)
        parse_cuda_graph_config(theirs)
        view = resolving_view(theirs)
        assert ours.attn_dp_size == view.attn_dp_size
        assert ours.cuda_graph_config.decode.backend == view.cuda_graph_config.decode.backend, fields


LIGHT = """
import sys
for name in ("torch", "sglang", "triton", "transformers", "whiflash_kernels", "whiflash_train", "datasets"):
    sys.modules[name] = None
from whiflash_sglang.cli import app
app.installed = lambda: None
app.main()
"""


def test_who_decides_needs_neither_torch_nor_sglang(write: Write) -> None:
    script = write("serve.sh", "sglang serve Qwen/Qwen3-8B --tp 2")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True)

    answered = run("advise", "Qwen3-8B", "--requests", "1", "--answer", "16")
    assert answered.stdout.startswith("Estimate for 1 request: "), answered.stderr
    judged = run("check", "--recipe", str(script))
    assert "--speculative-algorithm WHIFLASH" in judged.stdout, judged.stderr
    with serving() as server:
        measured = run("bench", "--url", f"running={server.url}", "--per-category", "1", "--repetitions", "1")
    assert "| running |" in measured.stdout, measured.stderr
    missing = run("bench")
    assert (missing.returncode, "needs torch, which is not installed" in missing.stderr) == (1, True), missing.stderr


@pytest.mark.newest
def test_the_command(write: Write) -> None:
    run = CliRunner().invoke
    good = write("good.yaml", "tp-size: 2")
    bad = write("bad.yaml", "pp-size: 2\nspeculative-algorithm: EAGLE\nspeculative-num-draft-tokens: 4")
    started = run(app, ["check", "--recipe", str(good)])
    assert (started.exit_code, started.output.splitlines()[0]) == (0, f"# {good}: starts")
    refused = run(app, ["check", "--recipe", str(bad), "--json"])
    assert refused.exit_code == 1
    (verdict,) = json.loads(refused.output)
    assert (verdict["recipe"], verdict["starts"], list(verdict["obstacles"])) == (str(bad), False, ["pp_size"])
    assert [line.split(" is ")[1][:12] for line in verdict["replaced"]] == ["replaced by ", "left out: WH"]
    several = run(app, ["check", "--recipe", str(PUBLISHED)])
    assert f"{STARTING} of 52 start (-v prints the commands); " in several.output
    for wrong in (["nowhere"], [str(good), "--draft", "x"]):
        assert run(app, ["check", "--recipe", *wrong]).exit_code == 2
