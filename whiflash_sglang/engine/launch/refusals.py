"""Refuse launches that WHIFLASH cannot serve, by one table of conditions.

Launches that are refused here start in SGLang and then serve wrong text, crash later or silently do something else.
Each sentence names the flag or the model and says what to do.

On CUDA some attention backends do not verify drafts in layers that attend through a sliding window. A verification is a
plain causal block at the end of each request. So a backend is right if every row, not the request as a whole, sees the
keys of its own window, and if attention sinks (gpt-oss) reach the kernel. Draft KV uses the slots of layers that see
the whole context. Windowed layers share them, or have a pool of their own (`launch.arguments.choose`).
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from whiflash_sglang.engine.carried import APP_PATH, WORKER_APP
from whiflash_sglang.engine.launch.facts import DISABLED
from whiflash_sglang.files.cpu import ATTENTION_BACKEND

if TYPE_CHECKING:
    from whiflash_sglang.engine.launch.facts import Launch

CUDA_ATTENTIONS = ("triton", "fa3", "fa4", "trtllm_mha", "trtllm_mla")
"""Attention backends that plan a verification of several widths correctly, eagerly and for a captured graph (shown on
CPU tensors; no GPU has run any of them). `triton` has a replacement in `engine/forward/`."""
ATTENTIONS = ("triton", "fa3", "fa4", "trtllm_mha")
"""Attention backends on CUDA for layers with windows. `triton` agrees with a formula under Triton's interpreter; the
others get the inputs that their documentation asks for (`tests/compat/interpreted_windows.py`; no GPU has run any).
"""


IMAGES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Classes that may be served with images: `tests/targets/test_images.py` compares each with plain decoding."""


def has_windows(model: Any) -> bool:
    """Whether layers of a target (SGLang's `ModelConfig`) have a sliding window, also if SGLang itself keeps their KV
    for the whole context (Gemma 2 and 3, OLMo 3)."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    text = model.hf_text_config
    return bool(
        model.is_hybrid_swa
        or is_hybrid_swa_model(model.hf_config.architectures, text)
        or "sliding_attention" in (getattr(text, "layer_types", None) or ())
    )


def has_heads_of_two_shapes(model: Any) -> bool:
    """Whether the K and V heads of windowed layers differ in number or width from those of other layers (Gemma 4,
    MiMo-V2), so that one pool cannot hold both."""
    if not has_windows(model):
        return False
    windowed = (model.swa_head_dim, model.swa_v_head_dim, model.get_swa_num_kv_heads(1))
    return bool(windowed != (model.head_dim, model.v_head_dim, model.get_num_kv_heads(1)))


Refusal = tuple[Callable[["Launch"], Any], str]
"""A condition and its sentence. The condition gives None or False if a launch is fine, else the text for the braces of
the sentence."""


def refusals_of(launch: "Launch") -> Iterator[tuple[str, str]]:
    """Yield name and sentence of every refusal of this launch."""
    for name, (condition, sentence) in REFUSALS.items():
        found = condition(launch)
        if found not in (None, False):
            yield name, sentence.format(found)


def refusal_of(launch: "Launch") -> str | None:
    """Return the sentence of the first refusal of this launch, or None."""
    return next((sentence for _, sentence in refusals_of(launch)), None)


def storage_refusal(server_args: Any, backend: str, draft_kv: bool) -> str | None:
    """Return why this storage cannot be attached to a running server; None if it can."""
    args = SimpleNamespace(
        hicache_storage_backend=backend, enable_streaming_session=server_args.enable_streaming_session
    )
    launch: Any = SimpleNamespace(args=args, draft_kv=draft_kv)
    rows = (REFUSALS["hicache_storage_backend"], REFUSALS["storage_sessions"])
    return next((sentence.format(found) for condition, sentence in rows if (found := condition(launch))), None)


def _on(argument: str) -> Callable[["Launch"], Any]:
    """Return the condition that an argument which is off by default is on."""
    return lambda launch: bool(getattr(launch.args, argument))


def _more_than_one(argument: str) -> Callable[["Launch"], Any]:
    return lambda launch: int(getattr(launch.args, argument) or 1) != 1


_peers = _more_than_one("attn_dp_size")
"""The condition that DP attention is on."""


def _set_beside_peers(variable: str) -> Callable[["Launch"], Any]:
    return lambda launch: _peers(launch) and launch.is_set(variable)


def _foreign_flag(launch: "Launch") -> str | None:
    """Return the first flag of SGLang's other speculative algorithms that the user gave, or None."""
    given = (f for f, default in FOREIGN.items() if launch.given.get(f, default) != default)
    return next(map(_flag, given), None)


def _architecture(condition: Callable[["Launch"], Any]) -> Callable[["Launch"], Any]:
    """Return a condition that gives the target's architecture if `condition` holds; None if not, or without a model."""
    return lambda launch: launch.architecture if launch.model is not None and condition(launch) else None


def _is_uncaptured(launch: "Launch") -> bool:
    from whiflash_sglang.engine.forward.captured import may_capture

    return not may_capture(launch.architecture)


def _recurrent() -> Any:
    """Return the module `recurrent`. It imports configurations of models, which only a target's judgement needs."""
    from whiflash_sglang.engine.forward import recurrent

    return recurrent


def _foreign_attention(launch: "Launch", *allowed: str) -> str | None:
    return min(launch.attention_backends.difference(allowed), default=None)


def _has_adapters(launch: "Launch") -> bool:
    return bool(launch.args.enable_lora or (launch.args.lora_paths and launch.args.enable_lora is None))


def _foreign_adapters(launch: "Launch") -> tuple[str, str] | None:
    """Return the LoRA backend that this device needs and the one that the user chose; None if the launch is fine."""
    # On a CPU SGLang's default is replaced (`whiflash_cpu/cpu.py`).
    takes = ("triton",) if launch.device == "cuda" else ("torch_native", "csgmv")
    named = launch.args.lora_backend
    return (takes[0], named) if _has_adapters(launch) and named not in takes else None


def _untested_beside_uno(launch: "Launch") -> str | None:
    """Return the first part of a launch that is untested with UNO's adapter or its pass over the target's state."""
    if not launch.uno:
        return None
    found = {
        "--enable-lora or --lora-paths": _has_adapters(launch),
        "--tp-size above 1 or --enable-dp-attention": _peers(launch) or _more_than_one("tp_size")(launch),
        "a quantised target": launch.model is not None and bool(launch.model.quantization),
        "the target's recurrent state": launch.model is not None and _recurrent().has_state(launch.model),
    }
    return next((what for what, there in found.items() if there), None)


def _captures(launch: "Launch", phase: str) -> bool:
    return launch.device == "cuda" and getattr(launch.args.cuda_graph_config, phase).backend != DISABLED


def _is_compressed(launch: "Launch") -> bool:
    from sglang.srt.configs.model_config import is_deepseek_v4

    return bool(is_deepseek_v4(launch.model.hf_config))


def _is_sparse(launch: "Launch") -> bool:
    from sglang.srt.configs.model_config import is_deepseek_dsa

    return bool(is_deepseek_dsa(launch.model.hf_config))


def _has_chunks(launch: "Launch") -> bool:
    kinds = getattr(launch.model.hf_text_config, "layer_types", None) or ()
    return bool(launch.model.is_local_attention_model or "chunked_attention" in kinds)


def _untested_media(launch: "Launch") -> str | None:
    """Return the target's architecture if it takes media that no test covers; None if not, or without a model."""
    model = launch.model
    if model is None or not (model.is_multimodal or model.is_audio_model):
        return None
    return None if launch.architecture in IMAGES else launch.architecture


FOREIGN: dict[str, Any] = {
    "speculative_num_steps": None,
    "speculative_eagle_topk": None,
    "speculative_num_draft_tokens": None,
    "speculative_token_map": None,
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "speculative_use_rejection_sampling": False,
    "speculative_draft_attention_backend": None,
    "speculative_draft_window_size": None,
    "speculative_draft_model_quantization": None,
    "speculative_adaptive": False,
    "enable_multi_layer_eagle": False,
    "uno_lora_path": None,
}
"""Arguments of SGLang's other speculative algorithms, with their defaults."""
_ONE_OF = {
    "pp_size": "a round is planned, drafted and verified by a process that has all layers",
    "dwdp_size": "its ranks do not count each other's rows, as a verification needs",
    "attn_cp_size": "drafters read the KV of all positions",
    "dcp_size": "drafters read the KV of all positions",
}
"""Sizes of parallel groups that must be 1 with WHIFLASH, and why."""
_REMOVE = "WHIFLASH does not work with {}; remove it"
_ONE_TOKEN = "it decodes one token a step, and a verification has several"
_HTTP = "WHIFLASH needs SGLang's own HTTP server, for its routes, checks and traces; "


def _flag(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _removed(**reasons: str) -> dict[str, Refusal]:
    """Return the refusals of switches that cannot be on. reasons: by argument."""
    return {
        argument: (_on(argument), _REMOVE.format(f"{_flag(argument)} ({reason})"))
        for argument, reason in reasons.items()
    }


def _removed_beside_draft_kv(**reasons: str) -> dict[str, Refusal]:
    """Return the refusals of switches that cannot be on if a drafter keeps KV of its own or reads features."""

    def row(argument: str, reason: str) -> Refusal:
        sentence = (
            f"WHIFLASH's drafters do not work with {_flag(argument)} ({reason}); remove it, or give "
            "--whiflash-drafters none"
        )
        return (lambda launch: launch.draft_kv and _on(argument)(launch), sentence)

    return {argument: row(argument, reason) for argument, reason in reasons.items()}


REFUSALS: dict[str, Refusal] = {
    # devices and parallel groups
    "device": (
        lambda x: x.device not in ("cpu", "cuda") and x.device,
        "WHIFLASH runs on the CPU and on CUDA, not on {}; serve without it",
    ),
    "cpu_engine": (
        lambda x: x.device == "cpu" and not x.own_platform,
        "WHIFLASH on the CPU needs whiflash-cpu (pip install dist/whiflash_cpu-*.whl), which is off if a GPU is "
        "visible or "
        "SGLANG_USE_CPU_ENGINE=1 is set; hide the GPU (CUDA_VISIBLE_DEVICES=) and unset SGLANG_USE_CPU_ENGINE",
    ),
    "cpu_attention": (
        lambda x: x.device == "cpu" and _foreign_attention(x, ATTENTION_BACKEND),
        f"WHIFLASH on the CPU needs --attention-backend {ATTENTION_BACKEND}, its default, not {{}}; remove the flag",
    ),
    "cuda_attention": (
        lambda x: x.device == "cuda" and _foreign_attention(x, *CUDA_ATTENTIONS),
        f"WHIFLASH on CUDA needs --attention-backend {', '.join(CUDA_ATTENTIONS)}, not {{}}, "
        "which is untested with drafts of several lengths; remove the flag",
    ),
    "cuda_xqa": (
        lambda x: x.device == "cuda" and x.xqa and "trtllm_mha" in x.attention_backends,
        "--attention-backend trtllm_mha runs the XQA kernel on this GPU, which cannot verify drafts of several "
        "lengths; remove the flag",
    ),
    "cuda_prefill_graphs": (
        lambda x: x.draft_kv and _captures(x, "prefill"),
        "prefills in CUDA graphs keep no features for WHIFLASH's drafters; give --cuda-graph-backend-prefill disabled",
    ),
    "cuda_graph_padding": (
        lambda x: _captures(x, "decode") and x.args.disable_cuda_graph_padding,
        "WHIFLASH pads verifications to the size of a CUDA graph; remove --disable-cuda-graph-padding, or give "
        "--cuda-graph-backend-decode disabled",
    ),
    "cuda_metadata_glue": (
        lambda x: _captures(x, "decode") and x.is_set("SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        "the plan of a verification changes its addresses every round and cannot be captured; unset "
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    ),
    "cuda_deterministic": (
        lambda x: x.device == "cuda" and x.args.enable_deterministic_inference,
        "WHIFLASH on CUDA cannot keep --enable-deterministic-inference: it verifies several rows together; remove it",
    ),
    **{
        argument: (
            _more_than_one(argument),
            f"WHIFLASH scales with --tp-size, --dp-size and --enable-dp-attention; "
            f"{_flag(argument)} must be 1 ({reason})",
        )
        for argument, reason in _ONE_OF.items()
    },
    **{
        variable.lower(): (
            _set_beside_peers(variable),
            f"with --enable-dp-attention WHIFLASH verifies on all ranks at once, by the rows of each; unset {variable}",
        )
        for variable in ("SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION", "SGLANG_SCHEDULER_SKIP_ALL_GATHER")
    },
    "moe_a2a_backend": (
        lambda x: x.args.moe_a2a_backend not in (None, "none") and x.args.moe_a2a_backend,
        "--moe-a2a-backend {} has buffers for a bounded number of rows a rank, which rounds do not keep to; remove it: "
        "--ep-size works without it",
    ),
    **_removed_beside_draft_kv(
        enable_attn_tp_input_scattered="a rank would keep features of its own tokens only",
        enable_layernorm_sp="a rank would keep features of its own tokens only",
    ),
    # targets
    "recurrent": (
        _architecture(lambda x: _recurrent().has_state(x.model) and not _recurrent().is_known(x.model)),
        "{} keeps a recurrent state that cannot be set back to the last accepted draft; serve it without WHIFLASH",
    ),
    "recurrent_sessions": (
        _architecture(lambda x: _recurrent().has_state(x.model) and x.args.enable_streaming_session),
        "{} keeps a recurrent state that cannot be set back to a session's last kept token; remove "
        "--enable-streaming-session",
    ),
    "compressed": (
        _architecture(_is_compressed),
        "{} compresses KV in pools of its own, which are untested with verifications of several widths; serve it "
        "without WHIFLASH",
    ),
    "sparse": (
        _architecture(_is_sparse),
        "{} attends to tokens that an index picks (DSA): SGLang's dsa backend verifies one length, and others "
        "attend to all tokens; serve it without WHIFLASH",
    ),
    "windows": (
        lambda x: (
            x.device == "cuda" and x.model is not None and has_windows(x.model) and _foreign_attention(x, *ATTENTIONS)
        ),
        "the target has layers with a sliding window, whose rows {} is not known to mask one by one; "
        f"give --attention-backend {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}",
    ),
    "window_heads": (
        _architecture(lambda x: not x.model.is_hybrid_swa and has_heads_of_two_shapes(x.model)),
        "{} has windowed layers with KV heads of another shape than its other layers, which one pool cannot hold; "
        "give --swa-full-tokens-ratio (SGLang's default is 0.8), without --disable-hybrid-swa-memory",
    ),
    "window_pool": (
        _architecture(lambda x: x.model.is_hybrid_swa and not x.model.full_attention_layer_ids),
        "{} has no layer that keeps plain KV for the whole context, and drafters keep theirs at the slots of one; "
        "remove --swa-full-tokens-ratio",
    ),
    "chunked_windows": (
        _architecture(_has_chunks),
        "{} attends within chunks, and a block of drafts may cross their bounds; serve it without WHIFLASH",
    ),
    "multimodal": (
        _untested_media,
        "{} is untested with images and sound; remove --enable-multimodal to serve its text",
    ),
    "multimodal_roles": (
        lambda x: x.args.enable_multimodal and x.args.disaggregation_mode != "null",
        "images are untested between prefill and decode servers; remove --enable-multimodal",
    ),
    "multimodal_peers": (
        lambda x: x.args.enable_multimodal and _peers(x),
        "images are untested with --enable-dp-attention; remove --enable-multimodal",
    ),
    "encoder": (
        _architecture(lambda x: x.model.is_encoder_decoder or not x.model.is_generation),
        "{} does not continue a prompt token by token; serve it without WHIFLASH",
    ),
    "one_file": (
        lambda x: x.model is not None and x.model.quantization in ("gguf", "expert_pack") and x.model.quantization,
        "the target is a {} file, which SGLang reads only on GPUs, untested with WHIFLASH; use a checkpoint in "
        "safetensors",
    ),
    # files of targets, HTTP and processes
    "workers_keys": (
        lambda x: _more_than_one("tokenizer_worker_num")(x) and bool(x.args.api_key or x.args.admin_api_key),
        "SGLang checks no keys with --tokenizer-worker-num above 1; remove --tokenizer-worker-num, or both keys",
    ),
    "workers_warm_up": (
        lambda x: _more_than_one("tokenizer_worker_num")(x) and x.tenant_header and not x.args.skip_server_warmup,
        "with --tokenizer-worker-num above 1 a warm-up may reach a worker that is up, which refuses it for "
        "--whiflash-trust-tenant-header on, since it names no tenant; give --skip-server-warmup",
    ),
    "workers_app": (
        lambda x: _more_than_one("tokenizer_worker_num")(x) and x.environment.get(APP_PATH, WORKER_APP) != WORKER_APP,
        f"tokenizer workers need WHIFLASH's application for its routes, checks and traces; unset {APP_PATH}",
    ),
    "rust_server": (lambda x: x.is_set("SGLANG_RUST_SERVER"), _HTTP + "unset SGLANG_RUST_SERVER"),
    **{  # The old name comes first, since SGLang resolves it to the new one too.
        argument: (_on(argument), _HTTP + f"remove {_flag(argument)}")
        for argument in ("grpc_mode", "smg_grpc_mode", "use_ray", "encoder_only")
    },
    "decoupled_spec_role": (
        lambda x: x.args.decoupled_spec_role not in (None, "null"),
        _REMOVE.format("--decoupled-spec-role (drafters run in the target's process)"),
    ),
    # caches and memory
    "hicache_storage_backend": (
        lambda x: (
            x.draft_kv and x.args.hicache_storage_backend not in (None, "file") and x.args.hicache_storage_backend
        ),
        "--hicache-storage-backend {} is untested with draft KV; give file, or give --whiflash-drafters none",
    ),
    "storage_sessions": (
        lambda x: x.args.enable_streaming_session and x.args.hicache_storage_backend,
        "--hicache-storage-backend {} beside --enable-streaming-session: SGLang's scheduler ends at a session's second "
        "turn; remove one of them",
    ),
    "hicache_host_memory_mode": (
        lambda x: x.draft_kv and x.args.hicache_host_memory_mode != "cache" and x.args.hicache_host_memory_mode,
        "--hicache-host-memory-mode {} is untested with draft KV; remove it, or give --whiflash-drafters none",
    ),
    **_removed(enable_lmcache="SGLang serves no speculative algorithm with it"),
    **_removed_beside_draft_kv(
        enable_flexkv="draft KV would not follow the target's",
        enable_unified_cache_external_linker="draft KV would not follow the target's",
    ),
    **_removed(
        enable_hisparse="untested with verifications of several rows",
        enable_unified_memory="untested with verifications of several rows",
    ),
    **_removed_beside_draft_kv(enable_page_major_kv_layout="draft KV has a layout of its own"),
    **_removed(enable_memory_saver="the drafters' memory is not released on sleep, and waking is untested"),
    **_removed(
        enable_linear_replayssm="it does not keep the state after each verified row",
        enable_linear_replayssm_spec="it does not keep the state after each verified row",
    ),
    **_removed(enable_int8_mamba_checkpoint="untested with WHIFLASH"),
    "mamba_radix_cache_strategy": (
        lambda x: x.args.mamba_radix_cache_strategy == "extra_buffer_lazy",
        "--mamba-radix-cache-strategy extra_buffer_lazy plans slots for drafts of one length; use extra_buffer",
    ),
    "radix_cache_backend": (
        lambda x: x.args.radix_cache_backend,
        "WHIFLASH needs SGLang's own radix cache; remove --radix-cache-backend {}",
    ),
    "post_capture_sizing": (
        lambda x: x.is_set("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        "the drafters' KV needs the size of the target's KV at the start; unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    ),
    "simulated_acceptance": (  # SGLang simulates lengths above 0 only
        lambda x: (
            None
            if (length := x.environment.get("SGLANG_SIMULATE_ACC_LEN", "")).strip("0.")[:1] in ("", "-")
            else length
        ),
        "SGLANG_SIMULATE_ACC_LEN={} pins the acceptance of SGLang's own algorithms only; unset it",
    ),
    # scheduling
    "lora_backend": (
        _foreign_adapters,
        "--lora-backend {0[1]} lays out the rows of adapters for drafts of one length; give --lora-backend {0[0]}",
    ),
    "lora_peers": (
        lambda x: _peers(x) and _has_adapters(x),
        "with --enable-dp-attention SGLang lays out all ranks' rows of adapters, for drafts of one length and with "
        "--lora-backend triton alone; remove --enable-lora and --lora-paths",
    ),
    **_removed(enable_lora_overlap_loading="untested beside verifications"),
    "uno": (_untested_beside_uno, "UNO is untested with {}; give no adapter of UNO, or serve without that"),
    **_removed(
        enable_watermark="its state is not kept per verified position",
        enable_torch_compile="it compiles sizes in requests, and a verification's are rows",
        enable_mis="FlashInfer's masks of several items are untested with it",
        enable_eplb="experts that move while it serves are untested",
    ),
    "enable_return_routed_experts": (
        _architecture(
            lambda x: (
                x.args.enable_return_routed_experts and not getattr(x.model.hf_text_config, "num_experts_per_tok", None)
            )
        ),
        "{} has no experts to return; remove --enable-return-routed-experts",
    ),
    **_removed(enable_two_batch_overlap=_ONE_TOKEN, enable_single_batch_overlap=_ONE_TOKEN, enable_pdmux=_ONE_TOKEN),
    "dllm_algorithm": (
        lambda x: bool(x.args.dllm_algorithm),
        _REMOVE.format("--dllm-algorithm (a diffusion target does not decode token by token)"),
    ),
    "grammar_backend": (
        lambda x: x.args.grammar_backend == "outlines",
        "WHIFLASH does not work with --grammar-backend outlines (it cannot take a token back, as drafts need); use "
        "xgrammar or llguidance",
    ),
    "other_algorithms": (
        _foreign_flag,
        "{} belongs to SGLang's other speculative algorithms and has no effect; WHIFLASH's bounds are "
        "--whiflash-eagle-steps and --whiflash-block-size; remove it",
    ),
}
"""The rows by their names: the first that stops a launch is shown."""

UNCAPTURED = (
    _architecture(_is_uncaptured),
    "{} has no hidden-state capture in SGLang, so no drafter can read it; give --whiflash-drafters none",
)
"""A refusal outside the table, since it stops a launch only if a drafter reads layers of the target."""
