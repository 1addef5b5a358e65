"""The worker that SGLang calls. A round: route, catch_up, draft, verify, commit, park (arXiv 2606.07710)."""

from functools import partial
from typing import Any

import torch

from whiflash_sglang.arms.base import of_text, widest_of, with_kv
from whiflash_sglang.cache import backlog
from whiflash_sglang.cache.tokens import TokenTable
from whiflash_sglang.device.clock import clock_of
from whiflash_sglang.device.transfers import Download, Upload
from whiflash_sglang.engine.carried import replace_settings, settings_of
from whiflash_sglang.engine.forward import graphs
from whiflash_sglang.engine.forward.parallel import ranks_of_model
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.engine.scheduler import disaggregation, draft_pool, hicache, overlap, pricing, releases
from whiflash_sglang.engine.scheduler.kv_budget import rehearse_sampling
from whiflash_sglang.engine.scheduler.spec_worker import (
    BaseSpecWorker,
    DraftInput,
    idle_result,
    max_running_requests,
    prefill_rows,
    round_batch,
    round_result,
    row_ids_of,
)
from whiflash_sglang.prices.round_clock import RoundClock
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.learning import results_of
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.serve.assemble import Stages, build_controller, build_drafters, build_policy, load_router, reserve
from whiflash_sglang.serve.metrics import Publisher, log_start, state_of
from whiflash_sglang.serve.prometheus import Prometheus
from whiflash_sglang.settings.config import Settings, changed
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.telemetry.samples import Spool
from whiflash_sglang.telemetry.tally import Tally


class WhiFlashWorker(BaseSpecWorker):  # type: ignore[misc]
    """Owns the drafters, their KV and the controller, and drives the target through SGLang's own worker."""

    flushes_later = False  # whether requests that are released now are flushed together afterwards

    # The scheduler starts with gradients on. Uses no_grad, not inference_mode: inference tensors cannot be modified in
    # place outside inference mode.
    @torch.no_grad()
    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        super().__init__()
        self._target_worker, self._draft_worker = target_worker, None
        self._server_args, self.settings = server_args, settings_of(server_args)
        self.target, self.ranks = Target(target_worker), ranks_of_model()
        self.target.peers.on_written = self._copy_target
        self.overlaps = overlap.is_on()
        self.spending = Spending(cuts=self.ranks.size == 1)
        self.drafters = build_drafters(self.settings, self.target, self.spending, late=self.overlaps)
        self.kv_arms, self.text_arms = with_kv(self.drafters), of_text(self.drafters)
        captured = sorted({i for d in self.kv_arms.values() for i in d.captured_layers})
        self.router = load_router(self.settings.neural, self.target)
        self.target.capture(captured, final_hidden=self.router is not None)
        self.clock, self.tally = RoundClock(clock_of(self.target.device)), Tally.of(self.drafters)
        self.quarantine = Quarantine(self.drafters, alone=self.ranks.size == 1, from_text=self.text_arms)
        # A prefill server sees only one token of an answer, so it has nothing to learn from.
        samples, sees_answers = self.settings.samples, self.ranks.leads and not disaggregation.prefills_only()
        learns = samples.directory is not None and sees_answers
        self.spool = Spool(samples, self.settings.target or server_args.model_path) if learns else None
        self.publisher = Publisher(self)
        self.controller = build_controller(
            self.settings, self.target, self.drafters, heads=self._has_heads, overlaps=self.overlaps
        )
        self.sync = DraftSync(
            self.drafters,
            max(min(backlog.TOKENS, self.target.context_len), widest_of(self.drafters) + 2),
            len(captured) * self.target.shape.hidden_size,
            self.target.dtype,
            self.quarantine,
        )
        self.reservation = reserve(self.drafters, self.sync, self.target, max_running_requests())
        releases.notify(self)

    def __getattr__(self, name: str) -> Any:
        # SGLang's scheduler asks this worker for attributes that only the target's worker has.
        if name == "_target_worker":
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    @torch.no_grad()
    def alloc_memory_pool(self, **pools: Any) -> None:
        """Allocate the drafters' KV, rings and token table for the target's pools, and build the stages."""
        super().alloc_memory_pool(**pools)
        for drafter in self.kv_arms.values():
            drafter.allocate(self.target.kv_slots)
        self.sync.allocate(self.target.slot_table)
        rows, context = self.target.slot_table.shape
        self.tokens = TokenTable(rows, context, widest_of(self.drafters) + 1, self.target.device)
        self.stages = Stages(self)

    def init_hicache_draft_plan(self) -> None:
        """Plan how draft KV follows the target's to host memory, and from a prefill to a decode server. The scheduler
        calls this when the pools are allocated.
        """
        self._draft_pool = draft_pool.pool_of(self.target, self.kv_arms)
        self.draft_layout = draft_pool.layout_of(self.target, self.kv_arms)
        self._hicache_draft_plan = hicache.plan(self._draft_pool)

    @property
    def primary_draft_kv_pool(self) -> Any:
        """Return the KV pool that a prefill server sends after the target's; None if it sends none."""
        return self._draft_pool

    @torch.no_grad()
    def init_cuda_graphs(self) -> None:
        """Capture verifications' ends and drafters' passes, and time them. SGLang has captured the target's graphs."""
        requests, costs = max_running_requests(), self.controller.costs
        recorder = graphs.recorder(self.target.runner)
        self.stages.ends.capture_seconds(recorder)
        self.stages.drafting.capture(recorder, requests)
        start = self.target, self.drafters, self.sync, self.clock.timer, requests
        pricing.price(costs, pricing.Start(*start), self.ranks)
        if self.ranks.leads:
            kv, policy = self.reservation, self.controller.policy.name
            log_start(policy, self.drafters, costs, draft_bytes=kv.per_token, token_bytes=kv.whole)

    def prewarm_sampling(self) -> Any:
        """Rehearse the largest sampling, to allocate its memory. Called by the scheduler last."""
        if self.target.device.type == "cuda":
            widest = widest_of(self.drafters) + 1
            rehearse_sampling(self.target.runner, graphs.most_rows(max_running_requests(), widest))
        return super().prewarm_sampling()

    def forward_batch_generation(
        self, batch: Any, on_publish: Any = None, grammar_barrier: Any = None, pp_proxy_tensors: Any = None
    ) -> Any:
        """Prefill an extend batch, or run a round of a decode batch (SGLang's spec-v2 interface)."""
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        if batch.forward_mode.is_idle() or not batch.reqs:
            return self._join(batch, on_publish)
        return self._round(batch, on_publish, grammar_barrier)

    def _join(self, batch: Any, on_publish: Any) -> Any:
        """Take part in a forward of other ranks when this one has no requests (DP attention)."""
        self.target.join(batch)
        result = idle_result(self.target.device)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        return result

    def _prefill(self, batch: Any, on_publish: Any) -> Any:
        """Run the target, then write all drafters' KV of the prompts, before the radix tree takes the slots."""
        self.clock.interrupt()
        self.ranks.note([req.rid for req in batch.reqs], batch.extend_lens)
        self.ranks.broadcast(lambda: None)  # Finds a missing rank, for which the forward would wait.
        input_ids = batch.input_ids
        result, features = self.target.prefill(batch)
        result.new_seq_lens = batch.seq_lens
        if on_publish is not None:
            on_publish(batch.seq_lens)
        if batch.forward_mode.is_idle():
            result.next_draft_input = idle_result(self.target.device).next_draft_input
            return result
        if (forcing := self.stages.forcing) is not None:
            until = [prefix + more for prefix, more in zip(batch.prefix_lens, batch.extend_lens, strict=True)]
            result.next_token_ids = forcing.prefilled(batch.reqs, until, result.next_token_ids)
        upload = Upload()
        row_ids, rows = row_ids_of(batch), batch.req_pool_indices.to(torch.int64)
        for req, row in zip(batch.reqs, row_ids, strict=True):
            self.stages.lifecycle.begin(row, req, upload)
        read = result.logits_output.mm_input_embeds
        prompt, lengths, last, following = prefill_rows(batch, input_ids, features, result.next_token_ids, upload, read)
        self.sync.prefill(prompt, row_ids, lengths, rows, last)
        self.tokens.put_block(rows, prompt.positions[last] + 1, following[:, None])
        result.next_draft_input = DraftInput(result.next_token_ids.to(torch.int64), batch.seq_lens.to(torch.int64))
        return result

    def adopt(self, batch: Any) -> None:
        """Open requests whose prompt a prefill server computed, with all drafters' KV of it."""
        upload, row_ids = Upload(), row_ids_of(batch)
        # A round that is under way may still write for earlier requests in these rows.
        with overlap.behind_forward(self.target.runner):
            for req, row in zip(batch.reqs, row_ids, strict=True):
                self.stages.lifecycle.begin(row, req, upload)
            rows = batch.req_pool_indices.to(torch.int64)
            self.sync.adopt(row_ids, batch.seq_lens_cpu.tolist(), rows, batch.seq_lens.to(torch.int64))
            upload.send(self.target.device)

    def _round(self, batch: Any, on_publish: Any, grammar_barrier: Any) -> Any:
        """Run one round of a decode batch, and return SGLang's record of it (`round_result`)."""
        round_ = round_batch(batch, self.target.context_len, self.stages.planner.under_way)
        clock, stages = self.clock, self.stages
        for previous in clock.begin():
            stages.learner.timed(previous)
        with clock.stage("route"):
            stages.planner.plan(round_)
        clock.planned()
        with clock.stage("catch_up"):
            self.sync.catch_up(round_.due, round_.catches_up, round_.rows, round_.starts)
            clock.extra_catch_up_seconds += self.sync.beyond_usual(round_.due, round_.row_ids, round_.plan.routes)
        with clock.stage("draft"):
            stages.drafting.draft(round_)
            self.sync.verifying.append(round_.packed_rows)
        with clock.stage("verify"):
            verified = stages.verifier.verify(batch, round_, grammar_barrier)
        with clock.stage("commit"):
            committed = stages.epilogue.commit(verified, round_.stride)
            self.target.commit(batch, round_.starts, committed.accept_lens)
            overlap.attach(batch, verified, committed.tokens.shape[1])
        with clock.stage("park"):
            stages.epilogue.park(verified, committed)
            signals = stages.signals.read(verified, committed, stages.learner.needs(round_))
            results = Download(results_of(round_, committed, signals))
            if on_publish is None:
                stages.learner.learn(round_, results.read())
            else:
                on_publish(results[results.at.seq_lens])
                overlap.carry(verified.output, results, partial(stages.learner.learn, round_))
        self.tally.round_seconds.append(clock.end(round_.time))
        self.publisher.tick()
        return round_result(verified, results)

    def clear_cache_pool(self) -> None:
        """Drop the state of all requests. SGLang calls this on `flush_cache`."""
        self.stages.lifecycle.forget_all()

    def settings_with(self, change: Any) -> Settings:
        """Return the settings after a change of policy. Raises ConfigError that names the invalid field."""
        settings = changed(self.settings, change)
        build_policy(settings, heads=self._has_heads)
        return settings

    def reconfigure(self, change: Any) -> None:
        """Change the policy while serving; running requests continue under the new one."""
        self.settings = self.settings_with(change)
        replace_settings(self._server_args, self.settings)
        self.controller.policy = build_policy(self.settings, heads=self._has_heads)
        self.publisher.flush()

    def snapshot(self) -> dict[str, Any]:
        """Return `state_of` this worker, for `GET /whiflash/state`."""
        return state_of(self)

    def publish_to(self, collector: Any) -> None:
        """Write metrics beside those of SGLang's `collector`. Only the rank that decides does, so rounds count once."""
        if self.ranks.leads:
            self.publisher.start(Prometheus(collector).write)

    def forget(self, handle: int | None) -> None:
        """Drop samples of the tenant with this handle, or of all (None), and all that drafters learned from texts."""
        self.stages.lifecycle.forget_text(handle)
        self.publisher.flush()

    def target_written(self) -> None:
        """Refresh copies of the target's weights after these were written. With DP attention that waits until every
        rank's were written: ranks hear of it in different passes, and a rank's write may fail.
        """
        self.target.peers.written += 1
        if self.target.peers.size == 1:
            self._copy_target()

    @torch.no_grad()
    def _copy_target(self) -> None:
        with overlap.behind_forward(self.target.runner):
            self.target.gather_head()
            for drafter in self.kv_arms.values():
                drafter.target_written()

    @property
    def _has_heads(self) -> bool:
        """Whether the router predicts acceptance lengths as well as ΔAL."""
        return self.router is not None and len(self.router.w2) > 1
