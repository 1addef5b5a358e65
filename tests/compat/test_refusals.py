"""Refused starts: every row of the table, on configurations of real model classes and on arguments only."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.arg_groups import lora_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.cuda_graph_config import Backend, default_cuda_graph_config
from sglang.srt.server_args import ServerArgs

from whiflash_sglang.engine import patching
from whiflash_sglang.engine.launch import arguments as launches
from whiflash_sglang.engine.launch.facts import Launch, fill_in_for_cuda
from whiflash_sglang.engine.launch.refusals import REFUSALS, refusal_of, refusals_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 32, "head_dim": 16}
SECTIONS = {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]}}
PACKED = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["re:.*lm_head"]}}}
MULTIMODAL = {"vision_config": {}, "text_config": {}}
RANKS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SPARSE = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2, **dict.fromkeys(RANKS, 16)}
TARGETS: dict[str, dict[str, Any]] = {
    "recurrent": {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"},
    "compressed": {
        "architectures": ["DeepseekV4ForCausalLM"],
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "sliding_window": 32,
        "index_head_dim": 16,
        "compress_ratios": [4] * 4,
    },
    "sparse": {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", **SPARSE},
    "chunked_windows": {"architectures": ["Llama4ForConditionalGeneration"]},
    "multimodal": {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **MULTIMODAL},
    "encoder": {"architectures": ["LlamaForSequenceClassification"]},
}
"""Differences from a Llama, by row."""


def target(directory: Path, base: dict[str, Any] = LLAMA, *, text_alone: bool = False, **changes: Any) -> ModelConfig:
    """SGLang's configuration of a checkpoint that consists of its `config.json`."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(base | changes))
    return ModelConfig(str(directory), enable_multimodal=False if text_alone else None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return target(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def taken(llama: ModelConfig) -> Launch:
    """A launch on the CPU that nothing is wrong with, as SGLang resolves it."""
    graphs = default_cuda_graph_config()
    graphs.decode.backend = graphs.prefill.backend = Backend.DISABLED
    args = ServerArgs(
        model_path="unused",
        device="cpu",
        attention_backend="whiflash_cpu",
        cuda_graph_config=graphs,
        disable_overlap_schedule=True,
        enable_lora=False,
    )
    return Launch(resolving_view(args), {}, llama, "cpu", own_platform=True, environment={})


def with_arguments(launch: Launch, **changes: Any) -> Launch:
    fields = {name: getattr(launch.args, name) for name in ServerArgs.__struct_fields__}
    return replace(launch, args=SimpleNamespace(**fields | changes), given=changes)


def on_cuda(launch: Launch) -> Launch:
    return replace(with_arguments(launch, attention_backend="trtllm_mla"), device="cuda", own_platform=False)


def sentence(launch: Launch) -> str:
    """The refusal, which is one sentence and says what to do."""
    found = refusal_of(launch)
    assert found is not None
    assert "\n" not in found
    assert "{" not in found
    words = ("remove", "unset", "give", "serve", "use", "must be", "hide")
    assert any(word in found for word in words), found
    return found


def test_what_is_fine_is_taken(taken: Launch) -> None:
    assert refusal_of(taken) is None
    assert refusal_of(with_arguments(taken, tp_size=2, dp_size=2)) is None
    assert refusal_of(with_arguments(taken, enable_deterministic_inference=True)) is None
    for workers in ({}, {"tokenizer_worker_num": 2, "skip_server_warmup": True}):
        assert refusal_of(replace(with_arguments(taken, **workers), tenant_header=True)) is None
    for backend in ("fa3", "fa4", "triton", "trtllm_mha", "trtllm_mla"):
        assert refusal_of(with_arguments(on_cuda(taken), attention_backend=backend)) is None
        graphs = with_arguments(on_cuda(taken), attention_backend=backend, cuda_graph_config=_DECODE)
        assert refusal_of(graphs) is None


@pytest.mark.parametrize("row", TARGETS)
def test_targets(taken: Launch, tmp_path: Path, row: str) -> None:
    model = target(tmp_path / row, **TARGETS[row])
    found = sentence(replace(taken, model=model))
    assert found == REFUSALS[row][1].format(model.hf_config.architectures[0])


KDA = {
    "linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3], "head_dim": 16, "num_heads": 2},
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
BLOCKS = {"layers_block_type": ["mamba", "attention"]}
UNLIKE = {**BLOCKS, "block_configs": [{"block_type": "mamba"}, {"block_type": "attention"}]}
"""Configuration of the variant whose layers differ among themselves."""
OWN_STATE = {"cpu": None, "triton": None, "sessions": "recurrent_sessions", "uno": "uno"}
KINDS: list[tuple[str, str, dict[str, Any], dict[str, str | None]]] = [
    # Take images too: of a kind whose state is committed or not, a session's is refused.
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", {}, {"sessions": "recurrent_sessions"}),
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", {}, {"sessions": "recurrent_sessions"}),
    ("MiniCPMV4_6ForConditionalGeneration", "minicpmv4_6", {}, {"sessions": "recurrent_sessions"}),
    ("MiniCPMV4_7ForConditionalGeneration", "minicpmv4_7", {}, {"sessions": "recurrent_sessions"}),
    ("Glm5NextForConditionalGeneration", "glm5_next", {}, {"sessions": "recurrent"}),
    ("Lfm2ForCausalLM", "lfm2", {"full_attn_idxs": [1, 3]}, OWN_STATE),
    ("Qwen3NextForCausalLM", "qwen3_next", {}, OWN_STATE),
    ("NemotronHForCausalLM", "nemotron_h", BLOCKS, OWN_STATE),
    ("NemotronHPuzzleForCausalLM", "nemotron_h_puzzle", UNLIKE, {"cpu": "recurrent", "triton": "recurrent"}),
    ("KimiLinearForCausalLM", "kimi_linear", KDA, OWN_STATE),
    ("KimiK3LinearForCausalLM", "kimi_linear", KDA, {"cpu": "recurrent", "triton": "recurrent"}),
    # SGLang does not call these hybrid; their layers have windows all the same.
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 16}, {"cpu": None, "trtllm_mla": "windows"}),
    ("Gemma3ForCausalLM", "gemma3_text", {"head_dim": 16}, {"cpu": None, "trtllm_mla": "windows"}),
    ("Olmo3ForCausalLM", "olmo3", {"head_dim": 16}, {"cpu": None, "trtllm_mla": "windows"}),
    # A window that SGLang's class does not read.
    ("MistralForCausalLM", "mistral", {"sliding_window": 32}, {"cpu": None}),
    ("Qwen3ForCausalLM", "qwen3", {"sliding_window": 32}, {"cpu": None}),
    ("DeepseekV2ForCausalLM", "deepseek_v2", {}, {"cpu": None, "trtllm_mla": None}),
    ("LlamaForCausalLM", "llama", {"quantization_config": PACKED}, {"cpu": None}),
]
"""Architecture, model type, what else differs from a Llama, and what refuses it by launch; None: it is taken."""


@pytest.mark.newest
@pytest.mark.parametrize(("architecture", "model_type", "changes", "rows"), KINDS)
def test_kinds_of_targets(
    taken: Launch,
    tmp_path: Path,
    architecture: str,
    model_type: str,
    changes: dict[str, Any],
    rows: dict[str, str | None],
) -> None:
    of_images = architecture.endswith("ForConditionalGeneration")
    base = {"torch_dtype": "bfloat16"} if of_images else LLAMA
    kind = {"architectures": [architecture], "model_type": model_type, **changes}
    launch = replace(taken, model=target(tmp_path / "model", base, text_alone=of_images, **kind))
    for where, row in rows.items():
        here = launch
        if where == "sessions":
            here = with_arguments(launch, enable_streaming_session=True)
        elif where == "uno":
            here = replace(launch, uno=True)
        elif where != "cpu":
            here = with_arguments(on_cuda(launch), attention_backend=where)
        assert next((name for name, _ in refusals_of(here)), None) == row, where
        if row is not None:
            sentence(here)


def chosen(**given: Any) -> SimpleNamespace:
    """A server's arguments on a CPU, of which nothing else was given, when `choose` has seen them."""
    switches = dict.fromkeys(("enable_mixed_chunk", "disable_hybrid_swa_memory"), False)
    left_open = dict.fromkeys(("enable_multimodal", "swa_full_tokens_ratio"))
    arguments = SimpleNamespace(device="cpu", **switches, **left_open | given)
    launches.choose(arguments)
    return arguments


def test_what_takes_images_is_served_for_text_unless_it_is_asked_for_them(taken: Launch, tmp_path: Path) -> None:
    kind = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **SECTIONS}
    text = target(tmp_path / "model", text_alone=True, **kind)
    assert text.model_is_mrope
    assert refusal_of(replace(taken, model=text)) is None
    with_images = replace(with_arguments(taken, enable_multimodal=True), model=target(tmp_path / "model", **kind))
    assert refusal_of(with_images) is None
    roles = with_arguments(with_images, disaggregation_mode="decode")
    assert "untested between prefill and decode servers" in sentence(roles)
    peers = with_arguments(with_images, attn_dp_size=2)
    assert "images are untested with --enable-dp-attention" in sentence(peers)
    assert chosen().enable_multimodal is False
    assert chosen(enable_multimodal=True).enable_multimodal is True


def test_a_gguf_target(taken: Launch, llama: ModelConfig) -> None:
    model = SimpleNamespace(**vars(llama) | {"quantization": "gguf"})
    assert "the target is a gguf file" in sentence(replace(taken, model=model))


@pytest.mark.parametrize("whole", [True, False])
def test_windows_are_verified_where_every_row_has_its_own(taken: Launch, tmp_path: Path, whole: bool) -> None:
    """whole: SGLang keeps the KV of all layers for the whole context, as a start of ours has it."""
    changes = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **WINDOWS}
    model = target(tmp_path / "windows", **changes)
    if whole:
        model = ModelConfig(str(tmp_path / "windows"), disable_hybrid_swa_memory=True)
    assert model.is_hybrid_swa is not whole
    assert refusal_of(replace(taken, model=model)) is None
    for attention in ("triton", "fa3", "fa4", "trtllm_mha"):
        on_gpu = with_arguments(on_cuda(taken), attention_backend=attention)
        assert refusal_of(replace(on_gpu, model=model)) is None
    found = sentence(replace(on_cuda(taken), model=model))
    assert "trtllm_mla is not known to mask" in found
    assert "give --attention-backend triton, fa3, fa4 or trtllm_mha" in found
    prefilled = with_arguments(on_cuda(taken), attention_backend="triton", prefill_attention_backend="trtllm_mla")
    assert "trtllm_mla is not known to mask" in sentence(replace(prefilled, model=model))


def test_windowed_layers_have_a_pool_of_their_own_if_it_is_sized(taken: Launch, tmp_path: Path) -> None:
    for ratio in (None, 0.5):
        assert chosen(swa_full_tokens_ratio=ratio).disable_hybrid_swa_memory is (ratio is None)
    sized, kind = with_arguments(taken, swa_full_tokens_ratio=0.5), {"model_type": "gpt_oss", **WINDOWS}
    some = target(tmp_path / "some", architectures=["GptOssForCausalLM"], **kind)
    assert refusal_of(replace(sized, model=some)) is None
    kind["layer_types"] = ["sliding_attention"] * 4
    every = target(tmp_path / "all", architectures=["GptOssForCausalLM"], **kind)
    assert "keeps plain KV for the whole context" in sentence(replace(sized, model=every))


@pytest.mark.parametrize("heads", [{"global_head_dim": 32}, {"num_global_key_value_heads": 1}])
def test_windowed_layers_with_heads_of_their_own_are_refused(
    taken: Launch, tmp_path: Path, heads: dict[str, int]
) -> None:
    """Gemma 4's published ones: one pool would have to hold both, two do."""
    kind = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    text |= {**WINDOWS, "model_type": "gemma4_text", "global_head_dim": 16, "attention_k_eq_v": True}
    refusals = []
    for changes, one_pool in (({}, True), (heads, True), (heads, False)):
        whole = {**kind, "torch_dtype": "bfloat16", "text_config": text | changes, "vision_config": {}}
        # SGLang reads a directory once.
        model = target(tmp_path / str(len(refusals)), {}, text_alone=True, **whole)
        model.is_hybrid_swa = not one_pool
        refusals.append(refusal_of(replace(taken, model=model)))
    assert refusals[0] is refusals[2] is None
    assert "heads of another shape" in str(refusals[1])


SWITCHES = """
enable_attn_tp_input_scattered enable_layernorm_sp smg_grpc_mode grpc_mode use_ray encoder_only
enable_lmcache enable_flexkv enable_unified_cache_external_linker enable_hisparse enable_unified_memory
enable_page_major_kv_layout enable_memory_saver enable_linear_replayssm enable_linear_replayssm_spec
enable_int8_mamba_checkpoint enable_watermark enable_mis enable_eplb enable_two_batch_overlap
enable_single_batch_overlap enable_pdmux enable_lora_overlap_loading enable_torch_compile
"""
ARGUMENTS: dict[str, tuple[Any, str]] = {
    **{switch: (True, f"--{switch.replace('_', '-')}(?!-)") for switch in SWITCHES.split()},
    **{size: (2, "--" + size.replace("_", "-")) for size in ("pp_size", "dwdp_size")},
    **{size: (2, "--" + size.replace("_", "-")) for size in ("attn_cp_size", "dcp_size")},
    "moe_a2a_backend": ("deepep", "--moe-a2a-backend deepep .* --ep-size works without it"),
    "decoupled_spec_role": ("verifier", "--decoupled-spec-role"),
    "hicache_storage_backend": ("mooncake", "--hicache-storage-backend mooncake .* give file"),
    "hicache_host_memory_mode": ("buffer_only", "--hicache-host-memory-mode buffer_only"),
    "mamba_radix_cache_strategy": ("extra_buffer_lazy", "extra_buffer_lazy .* use extra_buffer"),
    "radix_cache_backend": ("mine", "--radix-cache-backend mine"),
    "enable_return_routed_experts": (True, "LlamaForCausalLM has no experts"),
    "dllm_algorithm": ("LowConfidence", "--dllm-algorithm"),
    "grammar_backend": ("outlines", "--grammar-backend outlines .* use xgrammar or llguidance"),
    "cpu_attention": ("intel_amx", "needs --attention-backend whiflash_cpu, .* not intel_amx"),
    "other_algorithms": (1, "--speculative-num-steps belongs to .* --whiflash-eagle-steps"),
}
"""A value that is refused, and what the sentence names, by row."""
SPELT = {"cpu_attention": "attention_backend", "other_algorithms": "speculative_num_steps"}


BESIDE_DRAFT_KV = (
    "enable_attn_tp_input_scattered",
    "enable_layernorm_sp",
    "hicache_storage_backend",
    "hicache_host_memory_mode",
    "enable_flexkv",
    "enable_unified_cache_external_linker",
    "enable_page_major_kv_layout",
)
"""Rows that a server without a drafter does not have."""


@pytest.mark.parametrize("row", BESIDE_DRAFT_KV)
def test_without_a_drafter(taken: Launch, row: str) -> None:
    given = with_arguments(taken, **{row: ARGUMENTS[row][0]})
    assert "give --whiflash-drafters none" in sentence(given)
    assert refusal_of(replace(given, draft_kv=False)) is None


@pytest.mark.parametrize("row", ARGUMENTS)
def test_arguments(taken: Launch, row: str) -> None:
    value, named = ARGUMENTS[row]
    found = sentence(with_arguments(taken, **{SPELT.get(row, row): value}))
    assert re.search(named, found), found


_DECODE, _PREFILL = default_cuda_graph_config(), default_cuda_graph_config()
_PREFILL.prefill.backend = Backend.FULL
CUDA: dict[str, tuple[dict[str, Any], str]] = {
    "cuda_attention": (
        {"decode_attention_backend": "flashmla"},
        "triton, fa3, fa4, trtllm_mha, trtllm_mla, not flashmla",
    ),
    "cuda_prefill_graphs": (
        {"cuda_graph_config": _PREFILL, "attention_backend": "triton"},
        "--cuda-graph-backend-prefill disabled",
    ),
    "cuda_graph_padding": (
        {"cuda_graph_config": _DECODE, "attention_backend": "triton", "disable_cuda_graph_padding": True},
        "remove --disable-cuda-graph-padding",
    ),
    "cuda_deterministic": ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
    "lora_backend": (
        {"enable_lora": True},
        "--lora-backend csgmv lays out .* drafts of one length; give --lora-backend triton",
    ),
}


@pytest.mark.parametrize("row", CUDA)
def test_what_has_not_been_shown_on_cuda(taken: Launch, row: str) -> None:
    changes, named = CUDA[row]
    given = {"attention_backend": "trtllm_mha", **changes}
    assert re.search(named, sentence(replace(with_arguments(taken, **given), device="cuda")))


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": "xpu"}, "not on xpu"),
    "cpu_engine": ({"own_platform": False}, "SGLANG_USE_CPU_ENGINE"),
    "cuda_xqa": ({"device": "cuda", "xqa": True, "attention_backend": "trtllm_mha"}, "XQA"),
    "cuda_metadata_glue": (
        {
            "device": "cuda",
            "attention_backend": "triton",
            "cuda_graph_config": _DECODE,
            "environment": {"SGLANG_ENABLE_METADATA_GLUE_GRAPH": "1"},
        },
        "unset SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    ),
    "workers_keys": (
        {"tokenizer_worker_num": 2, "admin_api_key": "key"},
        "remove --tokenizer-worker-num, or both keys",
    ),
    "workers_warm_up": ({"tokenizer_worker_num": 2, "tenant_header": True}, "give --skip-server-warmup"),
    "workers_app": (
        {"tokenizer_worker_num": 2, "environment": {"SGLANG_HTTP_SERVER_APP_PATH": "mine:app"}},
        "unset SGLANG_HTTP_SERVER_APP_PATH",
    ),
    "rust_server": ({"environment": {"SGLANG_RUST_SERVER": "1"}}, "unset SGLANG_RUST_SERVER"),
    **{
        variable.lower(): ({"attn_dp_size": 2, "environment": {variable: "1"}}, f"unset {variable}")
        for variable in ("SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION", "SGLANG_SCHEDULER_SKIP_ALL_GATHER")
    },
    "storage_sessions": (
        {"enable_streaming_session": True, "hicache_storage_backend": "file"},
        "--hicache-storage-backend file beside --enable-streaming-session",
    ),
    "uno": ({"uno": True, "tp_size": 2}, "UNO is untested with --tp-size above 1"),
    "post_capture_sizing": (
        {"environment": {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "true"}},
        "unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    ),
    "simulated_acceptance": ({"environment": {"SGLANG_SIMULATE_ACC_LEN": "3"}}, "unset it"),
}


@pytest.mark.parametrize("row", ELSEWHERE)
def test_machine_and_environment(taken: Launch, row: str) -> None:
    changes, named = ELSEWHERE[row]
    ours = {name: changes[name] for name in Launch.__dataclass_fields__ if name in changes}
    theirs = {name: value for name, value in changes.items() if name not in ours}
    assert named in sentence(replace(with_arguments(taken, **theirs), **ours))


APART = {
    *("windows", "window_heads", "window_pool", "one_file", "recurrent_sessions"),
    *("multimodal_roles", "multimodal_peers", "lora_peers"),
}
"""Rows with tests of their own."""


@pytest.mark.newest
def test_every_row_has_its_case() -> None:
    assert REFUSALS.keys() == {*APART, *TARGETS, *ARGUMENTS, *CUDA, *ELSEWHERE}


def test_adapters_are_served_by_one_backend_a_device(taken: Launch) -> None:
    for launch, backend in ((taken, "torch_native"), (taken, "csgmv"), (on_cuda(taken), "triton")):
        given = with_arguments(launch, **vars(launch.args) | {"enable_lora": True, "lora_backend": backend})
        assert refusal_of(replace(given, device=launch.device, own_platform=launch.own_platform)) is None
    paths = {"enable_lora": None, "lora_paths": ["one=a"], "lora_backend": "triton"}
    assert "give --lora-backend torch_native" in sentence(with_arguments(taken, **paths))
    assert refusal_of(with_arguments(taken, **paths | {"enable_lora": False})) is None
    peers = {**paths, "lora_backend": "torch_native", "attn_dp_size": 2}
    assert "remove --enable-lora and --lora-paths" in sentence(with_arguments(taken, **peers))
    assert refusal_of(with_arguments(taken, **peers | {"lora_paths": None})) is None


def test_sglang_takes_adapters_beside_our_algorithm() -> None:
    patching.install(launches)
    ours = ServerArgs(model_path="unused", speculative_algorithm="WHIFLASH")
    with pytest.raises(ValueError, match="not WHIFLASH"):
        lora_hook.check_lora_speculative_compatibility(ours)
    ours._whiflash = None  # as `attach` marks it
    lora_hook.check_lora_speculative_compatibility(ours)


def test_on_cuda_what_was_left_open_is_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches.torch.cuda, "is_available", lambda: True)
    for hopper, attention in ((True, "fa3"), (False, "triton")):
        args = ServerArgs(model_path="unused")
        fill_in_for_cuda(args, hopper=hopper)
        assert (args.attention_backend, args.disable_overlap_schedule) == (attention, False)
        assert args.lora_backend == "triton"
        assert (args.cuda_graph_backend_decode, args.cuda_graph_backend_prefill) == (None, "disabled")
    chosen = ServerArgs(model_path="unused", attention_backend="trtllm_mha", cuda_graph_backend_decode="disabled")
    assert not fill_in_for_cuda(chosen, hopper=False)
    assert (chosen.attention_backend, chosen.cuda_graph_backend_decode) == ("trtllm_mha", "disabled")
    several = ServerArgs(model_path="unused", tp_size=2)
    fill_in_for_cuda(several, hopper=False)
    assert not several.disable_overlap_schedule
    elsewhere = ServerArgs(model_path="unused", device="cpu")
    launches.choose(elsewhere)
    assert elsewhere.attention_backend is None


@pytest.mark.parametrize(("hopper", "attention"), [(True, "fa3"), (False, "triton")])
def test_a_backend_that_plans_on_the_host_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hopper: bool, attention: str
) -> None:
    monkeypatch.setattr(launches.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launches, "get_platform", lambda: SimpleNamespace(is_sm90=hopper))
    args = ServerArgs(model_path="unused", attention_backend="flashinfer", decode_attention_backend="flashinfer")
    launches.choose(args)
    chosen = (args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend)
    assert chosen == (attention, None, None)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"--attention-backend flashinfer is replaced by {attention}",
        f"--decode-attention-backend flashinfer is replaced by {attention}",
    ]
    assert "every round would wait" in caplog.text
    half = ServerArgs(model_path="unused", attention_backend="trtllm_mha", prefill_attention_backend="flashinfer")
    launches.choose(half)
    assert (half.attention_backend, half.prefill_attention_backend) == ("trtllm_mha", None)
    assert "--prefill-attention-backend flashinfer is replaced by trtllm_mha" in caplog.text
