"""Members and parameters of SGLang's that are used and not replaced: each is checked before anything is replaced.

A name that is only imported is checked by its import. Replaced names have their own table (`engine/patching.py`).
"""

from collections.abc import Mapping

from whiflash_sglang.engine.supported import has

_TABLE = """
sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent  # since 0.5.23
    fused_sigmoid_gating_delta_rule_update(A_log, cu_seqlens, is_kda, lower_bound, disable_state_update)
    fused_sigmoid_gating_delta_rule_update(intermediate_states_buffer, initial_state_indices)
sglang.kernels.ops.mamba.triton_ops.mamba_ssm
    selective_state_update(state_batch_indices, pad_slot_id, out, disable_state_update, intermediate_states_buffer)
    selective_state_update(cache_steps, intermediate_state_indices)
sglang.kernels.ops.attention.verify_splitkv
    verify_splitkv_fwd(custom_mask, is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale, logit_cap)
    verify_splitkv_fwd(sliding_window_size, sinks, xai_temperature_len)
sglang.launch_server
    run_server(server_args)
sglang.srt.arg_groups.cuda_graph_hook
    parse_cuda_graph_config(server_args)
sglang.srt.arg_groups.model_override_base
    attention_backends_of(cfg)
    resolved_view(server_args)
sglang.srt.arg_groups.parallel_hook
    handle_deprecated_dp_attention(server_args)
sglang.srt.configs.hybrid_arch
    mambaish_config(model_config)
sglang.srt.configs.model_config
    is_deepseek_dsa(config)
    is_deepseek_v4(config)
    is_kimi_k3(config)
sglang.srt.constrained.base_grammar_backend
    BaseGrammarObject.accept_token(token)
    BaseGrammarObject.allocate_vocab_mask(vocab_size, batch_size, device)
    BaseGrammarObject.fill_vocab_mask(vocab_mask, idx)
    BaseGrammarObject.is_terminated
    BaseGrammarObject.rollback(k)
    GrammarMask.apply(logits)
sglang.srt.constrained.grammar_manager
    GrammarManager.has_waiting_grammars
sglang.srt.constrained.llguidance_backend
    GuidanceGrammar(ll_matcher)
sglang.srt.constrained.reasoner_grammar_backend
    ReasonerGrammarObject._is_generation
sglang.srt.constrained.xgrammar_backend
    XGrammarGrammar(matcher)
sglang.srt.disaggregation.common.conn
    CommonKVManager.record_failure(bootstrap_room, failure_reason)
    CommonKVManager.update_status(bootstrap_room, status)
sglang.srt.disaggregation.decode
    DecodePreallocQueue._init_receiver(decode_req, prefill_dp_rank)
sglang.srt.distributed.parallel_state
    GroupCoordinator.all_gather(input_, dim)
sglang.srt.entrypoints.anthropic.serving
    AnthropicServing._error_response(status_code, error_type, message)
sglang.srt.entrypoints.engine
    Engine.async_generate(input_ids, sampling_params, rid)
    Engine.run_scheduler_process_func
    Engine.shutdown
sglang.srt.entrypoints.http_server
    AuthLevel.ADMIN_OPTIONAL
    auth_level
sglang.srt.entrypoints.openai.serving_chat
    OpenAIServingChat._encoding_output  # since 0.5.23
    OpenAIServingChat._tool_call_parsing_active(request)
sglang.srt.layers.attention.attention_registry
    register_attention_backend(name)
sglang.srt.layers.attention.hybrid_linear_attn_backend
    HybridLinearAttnBackend.update_mamba_state_after_mtp_verify(last_correct_step_indices, mamba_track_indices)
    HybridLinearAttnBackend.update_mamba_state_after_mtp_verify(mamba_steps_to_track, model)
    Mamba2AttnBackend(model_runner)
    Mamba2AttnBackend.forward(mixer, hidden_states, output, layer_id, forward_batch, mup_vector)
    Mamba2AttnBackend.forward(use_triton_causal_conv)
    MambaAttnBackendBase.init_cuda_graph_state(max_bs, max_num_tokens)
sglang.srt.layers.attention.linear.gdn_backend
    GDNAttnBackend(model_runner)
    GDNAttnBackend.forward_extend(layer, forward_batch)
sglang.srt.layers.attention.linear.kda_backend
    KDAAttnBackend(model_runner)
    KDAAttnBackend._can_fuse_accept_state(verify_backend)
    KDAAttnBackend.forward_extend(layer, forward_batch)
sglang.srt.layers.attention.linear.short_conv_backend
    ShortConvAttnBackend(model_runner)
sglang.srt.layers.attention.triton_backend
    ForwardMetadata(qo_indptr)
    TritonAttnBackend(model_runner)
    TritonAttnBackend._build_cuda_graph_forward_metadata(bs, forward_mode, spec_info)
    TritonAttnBackend._update_target_verify_buffers(plan, bs, seq_lens, spec_info, req_pool_indices)
    TritonAttnBackend.init_cuda_graph_state(max_bs, max_num_tokens)
    TritonAttnBackend.init_forward_metadata(forward_batch)
sglang.srt.layers.logits_processor
    LogitsProcessorOutput(mm_input_embeds, next_token_logits)
    should_apply_lm_head_quant_method(lm_head, quant_method)
sglang.srt.layers.radix_attention
    RadixAttention(sliding_window_size)
sglang.srt.layers.sampler
    Sampler.forward(logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs)
sglang.srt.layers.vocab_parallel_embedding
    VocabParallelEmbedding.forward(input_)
sglang.srt.lora.backend.base_backend
    BaseLoRABackend.is_moe_lora
sglang.srt.lora.lora_manager
    LoRAManager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph, num_tokens_per_req)  # since 0.5.23
sglang.srt.lora.utils
    LoRABatchInfo(seg_lens, seg_indptr, max_len, expected_tokens)
sglang.srt.managers.detokenizer_manager
    DetokenizerManager._decode_batch_token_id_output(recv_obj)
sglang.srt.managers.embed_types
    PositionalEmbeds(embeds, positions)
sglang.srt.managers.io_struct
    GenerateReqInput(audio_data, image_data, video_data)
    GenerateReqInput(logprob_start_len, positional_embed_overrides, sampling_params, session_params, top_logprobs_num)
    GetInternalStateReq(rid)
    GetInternalStateReqOutput(internal_state)
    SetInternalStateReq(server_args, rid)
sglang.srt.managers.multi_tokenizer_mixin
    read_from_shared_memory(name)
sglang.srt.managers.overlap_utils
    FutureMap(device, req_to_token_pool, needs_cpu_seq_lens)
sglang.srt.managers.schedule_batch
    FINISH_ABORT(message, status_code, err_type)
    MultimodalInputs(mrope_position_delta)
    Req(extra_key, cache_salt, lora_id)
    Req._stop_match_tail_len(new_accepted_len)
    Req.check_match_stop_str_prefix
    Req.output_ids_through_stop
    Req.update_spec_cap_lens_histogram
    Req.update_spec_correct_drafts_histogram
    ScheduleBatch(multimodal_inputs)
    ScheduleBatch.filter_batch
    ScheduleBatch(reqs, forward_mode, req_pool_indices, seq_lens, seq_lens_cpu, orig_seq_lens, spec_algorithm)
sglang.srt.managers.scheduler
    Scheduler(server_args, port_args)
    Scheduler.init_req_max_new_tokens(req)
    Scheduler.get_output_streamer_class
    Scheduler.init_batch_result_processor
    Scheduler.init_internal_state
    Scheduler.is_fully_idle
    Scheduler.process_input_requests(recv_reqs)
    Scheduler.init_metrics_reporter
    Scheduler.init_request_receiver
    Scheduler.process_batch_result(batch, result)
    run_scheduler_process(server_args, port_args)
sglang.srt.managers.scheduler_components.batch_result_processor
    SchedulerBatchResultProcessor._resolve_spec_v2_tokens(result, batch)
sglang.srt.managers.scheduler_components.internal_state
    SchedulerInternalStateController._update_handlers
    SchedulerInternalStateController.get_internal_state(recv_req)
    SchedulerInternalStateController.set_internal_state(recv_req)
    UpdateRejected
sglang.srt.managers.scheduler_components.metrics_reporter
    SchedulerMetricsReporter.report_decode_stats
    SchedulerMetricsReporter.update_spec_metrics(bs, num_correct_drafts, num_accept_tokens, num_cap_tokens)
sglang.srt.managers.scheduler_components.output_streamer
    SchedulerOutputStreamer.build_additional_customized_info(reqs)
    SchedulerOutputStreamer.has_additional_customized_info
sglang.srt.managers.scheduler_components.request_receiver
    SchedulerRequestReceiver(recv_from_tokenizer, recv_from_rpc)
    SchedulerRequestReceiver._broadcast_reqs_across_ranks(recv_reqs, local_reqs)
sglang.srt.managers.tokenizer_manager
    ReqState.get_text
    ServerStatus.Starting
    TokenizerManager.auto_create_handle_loop
    TokenizerManager.config_value(name)
    TokenizerManager.server_status
sglang.srt.managers.tp_worker
    TpModelWorker.forward_batch_generation(batch, capture_hidden_mode)
sglang.srt.managers.utils
    GenerationBatchResult.copy_to_cpu(return_logprob, return_hidden_states)
    GenerationBatchResult(accept_lens, cap_lens, num_non_draft_tokens_per_req, speculative_output_stride)
sglang.srt.mem_cache.allocation
    assign_req_to_token_pool_func(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc)
sglang.srt.mem_cache.memory_pool
    MHATokenToKVPool(size, page_size, dtype, head_num, head_dim, layer_num, device, enable_memory_saver)
    MHATokenToKVPool(enable_alt_stream, kv_cache_layout, allocation_label)
    MHATokenToKVPool._create_buffers_normal
    MHATokenToKVPool.get_cpu_copy(indices)
    MHATokenToKVPool.load_cpu_copy(kv_cache_cpu, indices)
sglang.srt.model_executor.cuda_graph_buffer_registry
    PaddingPolicy.KEEP_PAD
sglang.srt.model_executor.cuda_graph_config
    Backend.DISABLED
    Phase.ALL
sglang.srt.model_executor.forward_batch_info
    CaptureHiddenMode.FULL
    ForwardBatch.init_new(batch, model_runner, capture_hidden_mode, return_hidden_states_before_norm)
    ForwardBatch.prepare_mlp_sync_batch(model_runner)
    ForwardMode.DECODE
sglang.srt.model_executor.model_runner
    ModelRunner._decode_cuda_graph_runner_cls
    ModelRunner.max_decode_logits_rows
sglang.srt.model_executor.pool_configurator
    DefaultPoolConfigurator
    HybridSWAPoolConfigurator._recompute_cell_size
sglang.srt.model_executor.runner.decode_cuda_graph_runner
    DecodeCudaGraphRunner(model_runner, attn_backend, speculative_num_draft_tokens)
    DecodeCudaGraphRunner._autotune_buffers
    DecodeCudaGraphRunner._build_ragged_verify_token_buckets
    DecodeCudaGraphRunner._can_run_ragged_verify_graph(forward_batch, ragged_layout)
    DecodeCudaGraphRunner._capture_ragged_verify_layout(num_tokens)
    DecodeCudaGraphRunner._ragged_capture_slots(num_tokens)
    DecodeCudaGraphRunner.capture
    DecodeCudaGraphRunner._stage_ragged_verify_layout(ragged_layout, graph_size_key)
    DecodeCudaGraphRunner.capture_one_shape(size, forward)
    DecodeCudaGraphRunner.get_spec_info(num_tokens)
    DecodeCudaGraphRunner.load_batch(forward_batch, pp_proxy_tensors)
sglang.srt.model_executor.runner_utils.pool
    get_or_create_global_graph_memory_pool(device_module)
sglang.srt.models.registry
    ModelRegistry.get_supported_archs
sglang.srt.observability.metrics_collector
    SchedulerMetricsCollector._counter_cls
    SchedulerMetricsCollector._gauge_cls
    SchedulerMetricsCollector._histogram_cls
sglang.srt.runtime_context
    RuntimeContext.resolved_server_args_dict
    mamba_track_grid(tree_page)
sglang.srt.sampling.sampling_batch_info
    ProcessorEntry(processor, rows, indices)
    SamplingBatchInfo.apply_logits_bias(logits)
sglang.srt.server_args
    prepare_server_args(argv)
sglang.srt.speculative.base_spec_worker
    BaseSpecWorker.init_hicache_draft_plan
    BaseSpecWorker.prewarm_sampling
    BaseSpecWorker.primary_draft_kv_pool
    HiCacheDraftMode.SIDECAR
    HiCacheDraftPlan(mode, device_pools)
sglang.srt.speculative.dflash_info
    DFlashVerifyInput(draft_token, positions, draft_token_num)
sglang.srt.speculative.ragged_verify
    RaggedVerifyLayout(verify_lens, graph_num_tokens, qo_indptr_device, verify_lens_cpu, total_verify_tokens)
    RaggedVerifyLayout.padded_to_bucket(padded_bs)
    RaggedVerifyMode.COMPACT
    resolve_ragged_verify_layout(forward_batch)
    round_up_grid(total, grid)
sglang.srt.speculative.spec_info
    SpecInputType.DFLASH_DRAFT
    SpeculativeAlgorithm.register
sglang.srt.speculative.spec_registry
    CustomSpecAlgo(name, factory, supports_overlap)
sglang.srt.speculative.spec_utils
    SIMULATE_ACC_LEN
    SIMULATE_ACC_METHOD
    SIMULATE_ACC_TOKEN_MODE
    check_simulate_acc_token_mode
    sample_simulated_acc_len(simulate_acc_len, simulate_acc_method, max_len)
sglang.srt.state_capturer.base
    TopkCaptureOutput(out_cache_loc, topk, host_cache)
sglang.srt.utils
    broadcast_pyobj(data, rank, dist_group, src)
sglang.srt.utils.auth
    _get_auth_level_from_app_and_scope(app, scope)
sglang.srt.utils.common
    async_d2h(tensor)
sglang.srt.utils.watchdog
    SubprocessWatchdog(processes, process_names)
"""
"""Names by module, with the parameters that are relied on. A name whose parameters take more than a line has several.
Behind a `#`, the release that brought it. A name that only an older one has changes no more, and is left out.
"""


def _read(table: str) -> Mapping[str, tuple[str, ...]]:
    """Without the names, and the modules with all of theirs, that the installed release does not have."""
    module, there, found = "", True, dict[str, tuple[str, ...]]()
    for line in table.strip().split("\n"):
        entry, _, since = line.partition("  # since ")
        name, _, parameters = entry.strip().rstrip(")").partition("(")
        known = not since or has(since)
        if not line.startswith(" "):
            module, there = name, known
        elif there and known:
            path = f"{module}:{name}"
            found[path] = found.get(path, ()) + tuple(parameters.split(", ") if parameters else ())
    return found


PRIVATE_NAMES = _read(_TABLE)
"""Parameters that must be among a name's own, by `module:attribute.path`; none of what is not called."""

HEAVY = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.entrypoints.openai",
    "sglang.srt.entrypoints.anthropic.serving",
    "sglang.launch_server",
    "sglang.srt.managers.multi_tokenizer_mixin",
    "sglang.srt.models.",
    "sglang.kernels.ops.attention.linear.",
    "sglang.kernels.ops.mamba.",
    "sglang.srt.layers.attention.linear.",
)
"""Modules of a launcher or of recurrent targets: checked by `whiflash check` and the tests, not at
every start."""
