# SPDX-License-Identifier: Apache-2.0
"""Ties MoEtion to a Megatron-Core training loop, with hooks that ``close`` removes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moetion.config import MoetionConfig
from megatron_moetion.mcore.optimizer import MegatronState, UserState
from megatron_moetion.mcore.traffic import TrafficHooks, node_crossing
from megatron_moetion.observe.trace import Trace, trace_name
from megatron_moetion.recover.capacity import CapacityRules
from megatron_moetion.replicate.gloo import GlooFabric
from megatron_moetion.schedule.recorder import EventClock, HostClock
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.select.book import ExpertState
from megatron_moetion.session import Resumed, Session
from megatron_moetion.store.node import restart_count


class Attached:
    """A session tied to a Megatron loop: call ``start`` once, ``on_step_end`` after each step, then ``close``."""

    def __init__(
        self,
        session: Session,
        state: MegatronState,
        model: Sequence[DistributedDataParallel],
        scheduler: Scheduler,
        trace: Trace | None,
    ) -> None:
        self._session = session
        self._state = state
        self._model = model
        self.scheduler = scheduler
        self._trace = trace
        self._traffic: TrafficHooks | None = None
        self.pipeline_arguments: dict[str, Any] = {}
        """After ``start``: what to pass to Megatron's schedule, so that its traffic is seen; may be empty."""
        self._handles = [
            o.register_step_pre_hook(lambda *_: session.before_optimizer_step()) for o in state.inner_optimizers()
        ]

    def start(self, load_persistent: Callable[[], int | None] | None = None) -> Resumed | None:
        """See ``Session.start``. From here on training's traffic is watched."""
        resumed = self._session.start(load_persistent)
        crosses = node_crossing(self._session.node_of)
        self._traffic = TrafficHooks(self._model, self.scheduler.recorder, crosses)
        self.pipeline_arguments = self._traffic.pipeline_arguments()
        return resumed

    def on_step_end(self, iteration: int) -> None:
        """See ``Session.on_step_end``."""
        self._session.on_step_end(iteration)

    def experts(self) -> tuple[ExpertState, ...]:
        """See ``Session.experts``."""
        return self._session.experts()

    def drain(self) -> None:
        """See ``Session.drain``."""
        self._session.drain()

    def scalars(self) -> dict[str, float]:
        """See ``Session.scalars``."""
        return self._session.scalars()

    @property
    def stable_iteration(self) -> int:
        """See ``Session.stable_iteration``."""
        return self._session.stable_iteration

    def close(self) -> None:
        """Finish what is in flight and undo everything that ``attach`` did."""
        self._session.close()
        if self._traffic is not None:
            self._traffic.close()
        if self._trace is not None:
            self._trace.close()
        for handle in self._handles:
            handle.remove()
        self._state.close()


def attach(
    *,
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler | None,
    config: MoetionConfig,
    user_state: UserState,
) -> Attached:
    """Prepare in-memory checkpointing; collective over all ranks.

    ``model`` is the list of DDP-wrapped model chunks, ``optimizer`` what ``get_megatron_optimizer`` returned for
    them. ``user_state`` is the loop's own state (iteration, consumed samples). Call it after model parallelism and
    the random seeds are set up and before the first step. Raises ``MoetionError`` subclasses for settings and
    models that cannot be captured exactly.
    """
    state = MegatronState(
        model=model,
        optimizer=optimizer,
        scheduler=opt_param_scheduler,
        user_state=user_state,
        count_tokens=config.mode == "popularity",
        log_steps=config.mode == "exact",
        capacity=CapacityRules(iterations=config.recalibration_iterations)
        if config.capacity_recalibration == "on"
        else None,
    )
    trace = open_trace(config, torch.distributed.get_rank())
    scheduler = Scheduler(
        config.schedule,
        EventClock() if state.is_on_gpu else HostClock(),
        eager_slice_bytes=max(1 << 16, min(8 << 20, config.in_flight_bytes // 8)),
        draw=trace.add if trace is not None else no_drawing,
    )
    fabric = GlooFabric(
        expert_peers=state.expert_peers(),
        timeout_s=config.timeout_s,
        in_flight_bytes=config.in_flight_bytes,
        gate=scheduler.gate,
    )
    session = Session(
        config=config,
        adapter=state,
        fabric=fabric,
        topology=_topology(),
        scheduler=scheduler,
        replayer=state if config.mode == "exact" else None,
    )
    return Attached(session, state, model, scheduler, trace)


def open_trace(config: MoetionConfig, rank: int) -> Trace | None:
    """This rank's trace, if one is asked for."""
    if not config.trace_dir:
        return None
    return Trace(Path(config.trace_dir) / trace_name(rank, restart_count(os.environ)), rank)


def _topology() -> str:
    sizes: dict[str, Any] = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items())
