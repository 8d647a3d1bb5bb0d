# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that trains a real model whose third iteration runs forward and backward twice.

Each way of doing so, and training without it, begins with the same model and data: what is counted must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron_trainer import WORLD_SIZE, Trainer, _build, _tear_down, join
from torch import distributed as dist
from toy_trainer import Notes

# isort: split
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_moetion.config import MoetionConfig
from megatron_moetion.mcore.attach import attach
from megatron_moetion.mcore.rng import load_rng_states, rng_states
from megatron_moetion.mcore.traffic import pipeline_arguments
from megatron_moetion.pretrain.model import transformer_config

STAGES = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --bf16 --use-distributed-optimizer"
ITERATIONS = 5
TWICE = 3
"""The iteration whose passes run twice."""
FLAGS = (
    "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer --moetion --moe-expert-capacity-factor 1 "
    "--moe-token-dispatcher-type alltoall --hidden-dropout 0.1"
)
Schedule = Callable[..., Any]


def main(folder: Path, store: Path, environment: Mapping[str, str]) -> int:
    """All ways; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    for name, wrap in WAYS.items():
        trainer = _build(rank, FLAGS)
        notes.write("way", name=name, **_train(trainer, store / name, wrap))
        _tear_down()
    trainer = _build(rank, STAGES)
    notes.write("given", name="given", **_given(trainer, store / "given"))
    _tear_down()
    dist.barrier()
    return 0


def _train(trainer: Trainer, store: Path, wrap: Callable[[Trainer, Schedule], Schedule]) -> dict[str, Any]:
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        config=MoetionConfig(
            mode="popularity", store=str(store), run_id="r", ranks_per_node=1, pack_threads=1, timeout_s=30
        ),
        user_state=trainer.state,
    )
    attached.start()
    trainer.pipeline_arguments = attached.pipeline_arguments
    tokens = attached.session.running.adapter.tokens
    passes: list[int] = []
    trainer._forward_backward = wrap(trainer, _counting(passes, trainer._forward_backward))
    found: dict[str, list[Any]] = {"losses": [], "totals": [], "routers": [], "timelines": []}
    for iteration in range(1, ITERATIONS + 1):
        found["losses"].append({k: v.hex() for k, v in trainer.train_step().losses.items()})
        attached.on_step_end(iteration)
        found["totals"].append([t.tolist() for t in tokens.counters.totals])
        found["routers"].append(tokens.routers.state.tolist())
        found["timelines"].append(attached.scheduler.newest_timeline.iteration)
    attached.close()
    return {**found, "passes": len(passes)}


def _given(trainer: Trainer, store: Path) -> dict[str, Any]:
    """The schedule has its communicator before there is a run; lanes of what is recorded before, during and after."""
    arguments = pipeline_arguments(transformer_config(trainer.args))
    trainer.pipeline_arguments = arguments
    losses = [trainer.train_step().losses]
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        config=MoetionConfig(mode="full", store=str(store), run_id="r", ranks_per_node=1, pack_threads=1, timeout_s=30),
        user_state=trainer.state,
        p2p_communicator=arguments["p2p_communicator"],
    )
    attached.start()
    lanes = []
    for iteration in (2, 3):
        losses.append(trainer.train_step().losses)
        attached.on_step_end(iteration)
        lanes.append(sorted({span.lane.value for span in attached.scheduler.newest_timeline.spans}))
    recorder, more = attached.scheduler.recorder, attached.pipeline_arguments
    attached.close()
    recorder.cut(3)
    losses.append(trainer.train_step().losses)
    after = recorder.cut(4)
    return {
        "losses": [{k: v.hex() for k, v in step.items()} for step in losses],
        "plain": [{k: v.hex() for k, v in trainer_step.items()} for trainer_step in _plain(trainer)],
        "lanes": lanes,
        "after": 0 if after is None else len(after.spans),
        "more": len(more),
    }


def _plain(trainer: Trainer) -> list[dict[str, float]]:
    """The losses of the same steps by Megatron's own communicator."""
    rank = dist.get_rank()
    _tear_down()
    other = _build(rank, STAGES)
    return [other.train_step().losses for _ in range(4)]


def _counting(passes: list[int], schedule: Schedule) -> Schedule:
    def counted(**how: Any) -> Any:
        passes.append(1)
        return schedule(**how)

    return counted


def _once(trainer: Trainer, schedule: Schedule) -> Schedule:
    return schedule


def _rerun_state_machine(trainer: Trainer, schedule: Schedule) -> Schedule:
    """The loop of Megatron's ``train_step``: the machine decides, and it asks for every iteration to be repeated.

    Outside of the iteration that is to run twice it is disabled.
    """
    machine = RerunStateMachine(
        state_save_func=rng_states, state_restore_func=load_rng_states, mode=RerunMode.REPORT_DETERMINISM_STATS
    )
    machine._maybe_report_stats = lambda: None  # it reads an attribute that is not there

    def run(**how: Any) -> Any:
        batches = [list(iterator) for iterator in how["data_iterator"]]
        is_twice = trainer.progress.iteration + 1 == TWICE
        machine.set_mode(RerunMode.REPORT_DETERMINISM_STATS if is_twice else RerunMode.DISABLED)
        losses = None
        while machine.should_run_forward_backward(None):
            _zero(trainer)
            losses = schedule(**how | {"data_iterator": [iter(b) for b in batches]})
            machine.validate_result(torch.zeros(()), rejection_func=lambda _: False, message="none", fatal=False)
        assert not machine.should_checkpoint_and_exit()[1]
        return losses

    return run


def _paged_stash(trainer: Trainer, schedule: Schedule) -> Schedule:
    """What Megatron's ``PagedStashRunner`` does around the schedule where tokens had no room: all of it once more."""

    def run(**how: Any) -> Any:
        batches = [list(iterator) for iterator in how["data_iterator"]]
        states = rng_states()
        losses = schedule(**how | {"data_iterator": [iter(b) for b in batches]})
        if trainer.progress.iteration + 1 != TWICE:
            return losses
        _zero(trainer)
        load_rng_states(states)
        return schedule(**how | {"data_iterator": [iter(b) for b in batches]})

    return run


def _real_paged_stash(trainer: Trainer, schedule: Schedule) -> Schedule:
    """Megatron's own runner, told of an overflow once. It goes on with the random states of then; here they go back."""
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    class Overflowing(PagedStashRunner):  # type: ignore[misc]
        asked = 0

        def check_moe_overflow(self) -> tuple[int, int, int]:
            self.asked += 1
            return (int(self.asked == TWICE), 0, 0)

        def prepare_for_rerun(self, is_training: bool = True) -> None:
            super().prepare_for_rerun(is_training)
            load_rng_states(self.states)

    config = trainer.model[0].module.config
    runner = Overflowing(config, False, trainer.model, trainer.optimizer, schedule)

    def run(**how: Any) -> Any:
        runner.states = rng_states()
        return runner(**how)

    return run


def _zero(trainer: Trainer) -> None:
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()


WAYS: dict[str, Callable[[Trainer, Schedule], Schedule]] = {
    "once": _once,
    "rerun state machine": _rerun_state_machine,
    "paged stash, a stand-in": _paged_stash,
}
try:
    from megatron.core.transformer.moe import paged_stash  # noqa: F401
except ImportError:  # 0.16
    pass
else:
    WAYS["paged stash"] = _real_paged_stash
