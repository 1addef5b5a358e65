"""SGLang's private names that are used and not replaced: every one is checked before anything is replaced. What is
replaced is in a table of its own (`compat/patching.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivateName:
    """`module:attribute.path` and the parameters that must be among its own; empty for non-callables."""

    path: str
    parameters: tuple[str, ...] = ()


_SERVING = "sglang.srt.entrypoints.openai"
_MESSAGES = "sglang.srt.entrypoints.anthropic.serving"
_TRITON = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend"
_FLASHINFER = "sglang.srt.layers.attention.flashinfer_backend"
_FLASHINFER_MLA = "sglang.srt.layers.attention.flashinfer_mla_backend:FlashInferMLAAttnBackend"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"
_POOL = "sglang.srt.model_executor.runner_utils.pool"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_WORKERS = "sglang.srt.managers.multi_tokenizer_mixin"

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    PrivateName("sglang.srt.plugins:load_plugins"),
    # algorithm and worker
    PrivateName("sglang.srt.mem_cache.memory_pool:HybridReqToTokenPool"),
    PrivateName("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.move_kv_cache", ("tgt_loc", "src_loc")),
    PrivateName("sglang.srt.mem_cache.memory_pool:MLATokenToKVPool.move_kv_cache", ("tgt_loc", "src_loc")),
    PrivateName("sglang.srt.state_capturer.base:TopkCaptureOutput", ("out_cache_loc", "topk", "host_cache")),
    PrivateName("sglang.srt.state_capturer.indexer_topk:get_global_indexer_capturer"),
    PrivateName("sglang.srt.state_capturer.routed_experts:get_global_experts_capturer"),
    PrivateName("sglang.srt.arg_groups.overrides:resolving_view"),
    PrivateName("sglang.srt.arg_groups.overrides:model_config_of"),
    PrivateName("sglang.srt.configs.hybrid_arch:mambaish_config", ("model_config",)),
    *(
        PrivateName(f"sglang.srt.configs.{name}")
        for name in (
            "kimi_linear:KimiLinearConfig",
            "lfm2:Lfm2Config",
            "lfm2_moe:Lfm2MoeConfig",
            "lfm2_vl:Lfm2VlConfig",
            "nemotron_h:NemotronHConfig",
            "qwen3_next:Qwen3NextConfig",
            "qwen3_5:Qwen3_5TextConfig",
            "qwen3_5:Qwen3_5MoeTextConfig",
        )
    ),
    PrivateName("sglang.srt.configs.model_config:is_deepseek_v4", ("config",)),
    PrivateName("sglang.srt.configs.model_config:is_hybrid_swa_model"),
    PrivateName("sglang.srt.configs.model_config:is_kimi_k3", ("config",)),
    PrivateName(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend:HybridLinearAttnBackend"
        ".update_mamba_state_after_mtp_verify",
        ("last_correct_step_indices", "mamba_track_indices", "mamba_steps_to_track", "model"),
    ),
    PrivateName("sglang.srt.runtime_context:mamba_track_grid", ("tree_page",)),
    PrivateName(
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent:fused_sigmoid_gating_delta_rule_update",
        (
            "A_log",
            "cu_seqlens",
            "is_kda",
            "lower_bound",
            "disable_state_update",
            "intermediate_states_buffer",
            "initial_state_indices",
        ),
    ),
    PrivateName(
        "sglang.kernels.ops.mamba.triton_ops.mamba_ssm:selective_state_update",
        (
            "state_batch_indices",
            "pad_slot_id",
            "out",
            "disable_state_update",
            "intermediate_states_buffer",
            "cache_steps",
            "intermediate_state_indices",
        ),
    ),
    PrivateName(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend:MambaAttnBackendBase.init_cuda_graph_state",
        ("max_bs", "max_num_tokens"),
    ),
    PrivateName(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend:Mamba2AttnBackend.forward",
        (
            "mixer",
            "hidden_states",
            "output",
            "layer_id",
            "forward_batch",
            "mup_vector",
            "use_triton_causal_conv",
        ),
    ),
    PrivateName(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend:Mamba2AttnBackend", ("model_runner",)
    ),
    PrivateName(
        "sglang.srt.layers.attention.linear.gdn_backend:GDNAttnBackend.forward_extend",
        ("layer", "forward_batch"),
    ),
    PrivateName("sglang.srt.layers.attention.linear.gdn_backend:GDNAttnBackend", ("model_runner",)),
    PrivateName(
        "sglang.srt.layers.attention.linear.kda_backend:KDAAttnBackend.forward_extend",
        ("layer", "forward_batch"),
    ),
    PrivateName(
        "sglang.srt.layers.attention.linear.kda_backend:KDAAttnBackend._can_fuse_accept_state",
        ("verify_backend",),
    ),
    PrivateName("sglang.srt.layers.attention.linear.kda_backend:KDAAttnBackend", ("model_runner",)),
    PrivateName(
        "sglang.srt.layers.attention.linear.short_conv_backend:ShortConvAttnBackend", ("model_runner",)
    ),
    PrivateName("sglang.srt.model_executor.cuda_graph_config:Backend.DISABLED"),
    PrivateName("sglang.srt.model_executor.cuda_graph_config:Phase.ALL"),
    PrivateName("sglang.srt.platforms:current_platform"),
    PrivateName("sglang.srt.runtime_context:get_platform"),
    PrivateName(
        "sglang.srt.managers.overlap_utils:FutureMap", ("device", "req_to_token_pool", "needs_cpu_seq_lens")
    ),
    PrivateName(
        "sglang.srt.managers.utils:GenerationBatchResult",
        ("accept_lens", "cap_lens", "num_non_draft_tokens_per_req", "speculative_output_stride"),
    ),
    PrivateName("sglang.srt.managers.auxiliary_output:CommittedTokens"),
    PrivateName("sglang.srt.managers.auxiliary_output:append_auxiliary_output"),
    PrivateName("sglang.srt.runtime_context:get_exec"),
    PrivateName("sglang.srt.runtime_context:get_schedule"),
    PrivateName("sglang.srt.layers.logits_processor:LogitsProcessorOutput", ("next_token_logits",)),
    PrivateName("sglang.srt.speculative.base_spec_worker:BaseSpecWorker.prewarm_sampling"),
    PrivateName("sglang.srt.runtime_context:get_spec"),
    PrivateName("sglang.srt.speculative.base_spec_worker:BaseSpecWorker"),
    PrivateName("sglang.srt.speculative.spec_info:SpecInput"),
    PrivateName("sglang.srt.speculative.spec_info:SpecInputType.DFLASH_DRAFT"),
    PrivateName("sglang.srt.speculative.spec_info:SpeculativeAlgorithm.register"),
    PrivateName(
        "sglang.srt.speculative.spec_registry:CustomSpecAlgo", ("name", "factory", "supports_overlap")
    ),
    # several rounds in one step
    PrivateName(
        f"{_COMPONENTS}.request_receiver:SchedulerRequestReceiver", ("recv_from_tokenizer", "recv_from_rpc")
    ),
    PrivateName("sglang.srt.constrained.grammar_manager:GrammarManager.has_waiting_grammars"),
    # several processes of one model
    PrivateName("sglang.srt.runtime_context:get_parallel"),
    PrivateName("sglang.srt.utils:broadcast_pyobj", ("data", "rank", "dist_group", "src")),
    PrivateName(
        f"{_COMPONENTS}.request_receiver:SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        ("recv_reqs", "local_reqs"),
    ),
    PrivateName("sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward", ("input_",)),
    PrivateName("sglang.srt.distributed.parallel_state:GroupCoordinator.all_gather", ("input_", "dim")),
    PrivateName(
        "sglang.srt.layers.logits_processor:should_apply_lm_head_quant_method", ("lm_head", "quant_method")
    ),
    # replicas
    PrivateName("sglang.srt.utils.watchdog:SubprocessWatchdog", ("processes", "process_names")),
    PrivateName("sglang.srt.managers.communicator:FanOutCommunicator.queueing_call", ("obj",)),
    # figures of speculation
    PrivateName(
        f"{_COMPONENTS}.metrics_reporter:SchedulerMetricsReporter.update_spec_metrics",
        ("bs", "num_correct_drafts", "num_accept_tokens", "num_cap_tokens"),
    ),
    PrivateName(f"{_COMPONENTS}.metrics_reporter:SchedulerMetricsReporter.report_decode_stats"),
    PrivateName("sglang.srt.managers.schedule_batch:Req.update_spec_correct_drafts_histogram"),
    PrivateName("sglang.srt.managers.schedule_batch:Req.update_spec_cap_lens_histogram"),
    # metrics
    PrivateName(
        "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector", ("labels", "server_args")
    ),
    PrivateName("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector._counter_cls"),
    PrivateName("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector._gauge_cls"),
    PrivateName("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector._histogram_cls"),
    # a request's tenant, output and stops
    PrivateName("sglang.srt.managers.schedule_batch:Req._stop_match_tail_len", ("new_accepted_len",)),
    PrivateName(
        f"{_COMPONENTS}.batch_result_processor:SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        ("result", "batch"),
    ),
    PrivateName("sglang.srt.managers.schedule_batch:Req", ("extra_key", "cache_salt")),
    PrivateName("sglang.srt.managers.schedule_batch:Req.output_ids_through_stop"),
    PrivateName(
        "sglang.srt.managers.schedule_batch:ScheduleBatch",
        (
            "reqs",
            "forward_mode",
            "req_pool_indices",
            "seq_lens",
            "seq_lens_cpu",
            "orig_seq_lens",
            "spec_algorithm",
        ),
    ),
    # target and verification
    PrivateName(
        "sglang.srt.speculative.dflash_info:DFlashVerifyInput",
        ("draft_token", "positions", "draft_token_num"),
    ),
    PrivateName(
        "sglang.srt.speculative.dflash_info:DFlashVerifyInput.prepare_for_verify",
        ("batch", "target_worker", "defer_metadata_init"),
    ),
    PrivateName(
        "sglang.srt.speculative.ragged_verify:RaggedVerifyLayout",
        ("verify_lens", "graph_num_tokens", "qo_indptr_device", "verify_lens_cpu", "total_verify_tokens"),
    ),
    PrivateName("sglang.srt.environ:envs"),
    PrivateName("sglang.srt.speculative.ragged_verify:RaggedVerifyLayout.padded_to_bucket", ("padded_bs",)),
    PrivateName("sglang.srt.speculative.ragged_verify:RaggedVerifyMode.COMPACT"),
    PrivateName(
        "sglang.srt.speculative.ragged_verify:build_capture_verify_lens",
        ("num_tokens", "num_slots", "num_draft_tokens"),
    ),
    PrivateName("sglang.srt.speculative.ragged_verify:round_up_grid", ("total", "grid")),
    PrivateName("sglang.srt.model_executor.model_runner:ModelRunner._decode_cuda_graph_runner_cls"),
    PrivateName(f"{_POOL}:get_or_create_global_graph_capture_stream"),
    PrivateName(f"{_POOL}:get_or_create_global_graph_memory_pool", ("device_module",)),
    PrivateName(f"{_POOL}:graph_pool_capture_scope"),
    PrivateName(f"{_POOL}:graph_pool_replay_scope"),
    PrivateName(_GRAPHS, ("model_runner", "attn_backend", "speculative_num_draft_tokens")),
    PrivateName(f"{_GRAPHS}._autotune_buffers"),
    PrivateName(f"{_GRAPHS}._build_ragged_verify_token_buckets"),
    PrivateName(f"{_GRAPHS}._can_run_ragged_verify_graph", ("forward_batch", "ragged_layout")),
    PrivateName(f"{_GRAPHS}._capture_ragged_verify_layout", ("num_tokens",)),
    PrivateName(f"{_GRAPHS}.capture_one_shape", ("size", "forward")),  # calls `capture_tail_hooks`
    PrivateName(f"{_GRAPHS}._ragged_capture_slots", ("num_tokens",)),
    PrivateName(f"{_GRAPHS}._stage_ragged_verify_layout", ("ragged_layout", "graph_size_key")),
    PrivateName(f"{_GRAPHS}.get_spec_info", ("num_tokens",)),
    PrivateName("sglang.srt.speculative.ragged_verify:resolve_ragged_verify_layout", ("forward_batch",)),
    PrivateName("sglang.srt.arg_groups.model_override_base:attention_backends_of", ("cfg",)),
    PrivateName("sglang.srt.arg_groups.model_override_base:resolved_view", ("server_args",)),
    PrivateName("sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS"),
    PrivateName("sglang.srt.layers.attention.attention_registry:register_attention_backend", ("name",)),
    PrivateName("sglang.srt.layers.radix_attention:RadixAttention", ("sliding_window_size",)),
    PrivateName(_TRITON, ("model_runner",)),
    PrivateName(f"{_TRITON}.init_forward_metadata", ("forward_batch",)),
    PrivateName(f"{_TRITON}.init_cuda_graph_state", ("max_bs", "max_num_tokens")),
    PrivateName(
        f"{_TRITON}._update_target_verify_buffers",
        ("plan", "bs", "seq_lens", "spec_info", "req_pool_indices"),
    ),
    PrivateName(f"{_TRITON}._build_cuda_graph_forward_metadata", ("bs", "forward_mode", "spec_info")),
    PrivateName("sglang.srt.layers.attention.triton_backend:ForwardMetadata", ("qo_indptr",)),
    PrivateName(f"{_FLASHINFER}:FlashInferAttnBackend", ("model_runner", "init_new_workspace")),
    PrivateName(f"{_FLASHINFER}:FlashInferAttnBackend._create_prefill_wrappers", ("bs",)),
    PrivateName(
        f"{_FLASHINFER}:FlashInferAttnBackend.init_forward_metadata_out_graph",
        ("forward_batch", "in_capture"),
    ),
    PrivateName(
        f"{_FLASHINFER}:FlashInferIndicesUpdaterPrefill.update_single_wrapper",
        ("prefix_lens", "prefill_wrappers", "use_ragged", "encoder_lens", "spec_info", "plan"),
    ),
    PrivateName(f"{_FLASHINFER}:PrefillMetadata", ("prefill_wrappers", "use_ragged", "extend_no_prefix")),
    PrivateName(f"{_FLASHINFER_MLA}.init_cuda_graph_state", ("max_bs", "max_num_tokens", "kv_indices_buf")),
    PrivateName("sglang.srt.model_executor.forward_batch_info:CaptureHiddenMode.FULL"),
    PrivateName("sglang.srt.model_executor.forward_batch_info:ForwardMode.DECODE"),
    PrivateName("sglang.srt.model_executor.forward_batch_info:get_server_return_hidden_states_mode"),
    # sampling
    PrivateName("sglang.srt.constrained.base_grammar_backend:GrammarMask.apply", ("logits",)),
    PrivateName(
        "sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.allocate_vocab_mask",
        ("vocab_size", "batch_size", "device"),
    ),
    PrivateName(
        "sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.fill_vocab_mask", ("vocab_mask", "idx")
    ),
    PrivateName("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.accept_token", ("token",)),
    PrivateName("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.rollback", ("k",)),
    PrivateName("sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.is_terminated"),
    PrivateName("sglang.srt.speculative.spec_utils:GrammarTree.resolve"),
    PrivateName(
        "sglang.srt.layers.sampler:Sampler.forward",
        ("logits_output", "sampling_info", "return_logprob", "top_logprobs_nums", "token_ids_logprobs"),
    ),
    PrivateName("sglang.srt.sampling.sampling_batch_info:ProcessorEntry", ("processor", "rows", "indices")),
    PrivateName("sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias", ("logits",)),
    PrivateName("sglang.srt.speculative.spec_utils:GrammarTree.from_device", ("retrieve_next_token",)),
    PrivateName("sglang.srt.speculative.spec_utils:SIMULATE_ACC_LEN"),
    PrivateName("sglang.srt.speculative.spec_utils:SIMULATE_ACC_METHOD"),
    PrivateName("sglang.srt.speculative.spec_utils:SIMULATE_ACC_TOKEN_MODE"),
    PrivateName("sglang.srt.speculative.spec_utils:check_simulate_acc_token_mode"),
    PrivateName(
        "sglang.srt.speculative.spec_utils:sample_simulated_acc_len",
        ("simulate_acc_len", "simulate_acc_method", "max_len"),
    ),
    PrivateName("sglang.srt.constrained.xgrammar_backend:XGrammarGrammar", ("matcher",)),
    PrivateName("sglang.srt.constrained.llguidance_backend:GuidanceGrammar", ("ll_matcher",)),
    PrivateName("sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._grammar_active"),
    # memory and radix keys
    PrivateName("sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator"),
    PrivateName("sglang.srt.model_executor.pool_configurator:HybridSWAPoolConfigurator._recompute_cell_size"),
    PrivateName("sglang.srt.mem_cache.allocation_sizing:get_alloc_reserve_per_decode"),
    # a scheduler of our own
    *(
        PrivateName(f"sglang.srt.managers.scheduler:Scheduler.{name}")
        for name in (
            "init_metrics_reporter",
            "init_request_receiver",
            "get_output_streamer_class",
            "init_batch_result_processor",
            "init_internal_state",
        )
    ),
    PrivateName("sglang.srt.managers.scheduler:Scheduler.process_batch_result", ("batch", "result")),
    PrivateName("sglang.srt.managers.scheduler:Scheduler._create_generation_req", ("recv_req",)),
    # draft KV in host memory
    PrivateName(
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
        (
            *(
                "size",
                "page_size",
                "dtype",
                "head_num",
                "head_dim",
                "layer_num",
                "device",
                "enable_memory_saver",
            ),
            *("enable_alt_stream", "kv_cache_layout", "allocation_label"),
        ),
    ),
    PrivateName("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._create_buffers_normal"),
    PrivateName("sglang.srt.speculative.base_spec_worker:BaseSpecWorker.init_hicache_draft_plan"),
    PrivateName("sglang.srt.speculative.base_spec_worker:HiCacheDraftMode.SIDECAR"),
    PrivateName("sglang.srt.speculative.base_spec_worker:HiCacheDraftPlan", ("mode", "device_pools")),
    PrivateName("sglang.srt.runtime_context:get_memory"),
    # the trace, out of the scheduler and into responses
    PrivateName(f"{_COMPONENTS}.output_streamer:SchedulerOutputStreamer.has_additional_customized_info"),
    PrivateName(
        f"{_COMPONENTS}.output_streamer:SchedulerOutputStreamer.build_additional_customized_info", ("reqs",)
    ),
    # streams, cut for those that read them token by token
    PrivateName(f"{_SERVING}.serving_chat:OpenAIServingChat._tool_call_parsing_active", ("request",)),
    PrivateName(f"{_SERVING}.serving_chat:OpenAIServingChat._encoding_output"),
    PrivateName(
        "sglang.srt.managers.detokenizer_manager:DetokenizerManager._decode_batch_token_id_output",
        ("recv_obj",),
    ),
    PrivateName("sglang.srt.managers.schedule_batch:Req.check_match_stop_str_prefix"),
    PrivateName("sglang.srt.managers.tokenizer_manager:_INCREMENTAL_STREAMING_META_INFO_KEYS"),
    PrivateName(f"{_MESSAGES}:AnthropicServing._error_response", ("status_code", "error_type", "message")),
    PrivateName("sglang.srt.entrypoints.http_server:app.routes"),
    PrivateName("sglang.srt.entrypoints.http_server:app.user_middleware"),
    PrivateName("sglang.srt.entrypoints.http_server:auth_level"),
    PrivateName("sglang.srt.entrypoints.http_server:AuthLevel.ADMIN_OPTIONAL"),
    PrivateName(
        "sglang.srt.managers.io_struct:GenerateReqInput",
        (
            "logprob_start_len",
            "positional_embed_overrides",
            "sampling_params",
            "session_params",
            "top_logprobs_num",
        ),
    ),
    PrivateName("sglang.srt.managers.embed_types:PositionalEmbeds", ("embeds", "positions")),
    PrivateName("sglang.srt.managers.tokenizer_manager:TokenizerManager.config_value", ("name",)),
    PrivateName("sglang.srt.managers.tokenizer_manager:TokenizerManager.server_status"),
    PrivateName("sglang.srt.managers.tokenizer_manager:ServerStatus.Starting"),
    PrivateName("sglang.srt.constants:HEALTH_CHECK_RID_PREFIX"),
    PrivateName("sglang.srt.managers.tokenizer_manager:ReqState.get_text"),
    # state and control
    PrivateName("sglang.srt.managers.io_struct:SetInternalStateReq", ("server_args",)),
    PrivateName("sglang.srt.managers.io_struct:GetInternalStateReq", ("rid",)),
    PrivateName(
        f"{_COMPONENTS}.internal_state:SchedulerInternalStateController.get_internal_state", ("recv_req",)
    ),
    PrivateName("sglang.srt.managers.tokenizer_manager:TokenizerManager.auto_create_handle_loop"),
    PrivateName(f"{_COMPONENTS}.internal_state:SchedulerInternalStateController._update_handlers"),
    PrivateName(f"{_COMPONENTS}.internal_state:UpdateRejected"),
    # an offline engine for training data
    PrivateName("sglang.srt.entrypoints.engine:Engine.run_scheduler_process_func"),
    PrivateName(
        "sglang.srt.entrypoints.engine:Engine.async_generate", ("input_ids", "sampling_params", "rid")
    ),
    PrivateName("sglang.srt.entrypoints.engine:Engine.shutdown"),
    PrivateName("sglang.srt.managers.scheduler:run_scheduler_process", ("server_args", "port_args")),
    PrivateName("sglang.srt.managers.scheduler:Scheduler", ("server_args", "port_args")),
    PrivateName(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        ("batch", "capture_hidden_mode"),
    ),
    # servers that share one import
    PrivateName("sglang.launch_server:run_server", ("server_args",)),
    PrivateName("sglang.srt.server_args:prepare_server_args", ("argv",)),
    PrivateName("sglang.srt.models.registry:ModelRegistry.get_supported_archs"),
    # tokenizer workers
    PrivateName(f"{_WORKERS}:get_main_process_id", ()),
    PrivateName(f"{_WORKERS}:read_from_shared_memory", ("name",)),
    # launches judged by their flags
    PrivateName("sglang.srt.arg_groups.cuda_graph_hook:parse_cuda_graph_config", ("server_args",)),
    PrivateName("sglang.srt.arg_groups.parallel_hook:handle_deprecated_dp_attention", ("server_args",)),
)

HEAVY = (
    "sglang.srt.entrypoints.http_server",
    _SERVING,
    _MESSAGES,
    "sglang.launch_server",
    _WORKERS,
    "sglang.srt.models.registry",
    "sglang.kernels.ops.attention.linear.",
    "sglang.kernels.ops.mamba.",
    "sglang.srt.layers.attention.flashinfer",
    "sglang.srt.layers.attention.linear.",
)
"""Modules of a launcher, of one attention or of recurrent targets: checked by `whiflash check` and the tests, not at
every start."""
