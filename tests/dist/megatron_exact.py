# SPDX-License-Identifier: Apache-2.0
"""One of four ranks that trains real Megatron-Core models in mode ``exact`` and loses everything again and again.

A fault is total for what is in the process: model, optimizer and session are made anew and filled with noise, and only
arenas are left. The ranks' processes live on.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron_trainer import (
    WORLD_SIZE,
    Model,
    Trainer,
    _build,
    _gathered_image,
    _scramble,
    _state,
    _step,
    _tear_down,
    join,
)
from torch import distributed as dist
from toy_trainer import Notes

# isort: split
from megatron.core import optimizer as megatron_optimizer

from megatron_moetion.config import MoetionConfig
from megatron_moetion.mcore.attach import Attached, attach
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.pretrain import model as model_module

PERIOD = 3
_RUN = "exact"
ITERATIONS = 16
FAULTS = ((4, None), (5, 1), (6, None), (6, 0), (9, None), (10, 1), (11, None), (13, None), (14, 1))
"""After which iteration, and which node's memory goes with the processes. Three in a row meet every phase."""
WITHOUT_STEP, OF_TWO_STEPS = 8, 13
"""Iterations in which the loop takes no step of the optimizer, and two."""

_PP = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
_DP = "--expert-model-parallel-size 2"
_SPLIT = "--use-distributed-optimizer"
CASES = {
    "pp2 ep2, bf16, distributed": f"{_PP} --bf16 {_SPLIT}",
    "ep2 dp2, bf16, distributed, overlapped": f"{_DP} --bf16 {_SPLIT} --overlap-grad-reduce --overlap-param-gather",
    "ep2 dp2, fp32, distributed, overlapped": f"{_DP} {_SPLIT} --overlap-grad-reduce --overlap-param-gather",
    "pp2 ep2, fp32": f"{_PP} --clip-grad 0.05",
    "ep2 dp2, bf16": f"{_DP} --bf16",
    "ep2 dp2, bf16 gradients, distributed": f"{_DP} --bf16 --grad-reduce-in-bf16 --clip-grad 0.05 {_SPLIT}",
    "pp2 ep2, bf16 gradients": f"{_PP} --bf16 --grad-reduce-in-bf16 --clip-grad 0.05",
    "pp2 ep2, fp16, skipped steps": (
        f"{_PP} --fp16 --initial-loss-scale 4194304 --hysteresis 1 --loss-scale-window 3 "
        f"--accumulate-allreduce-grads-in-fp32 {_SPLIT}"
    ),
    "ep2 dp2, fp16 gradients, skipped steps": (
        f"{_DP} --fp16 --initial-loss-scale 4194304 --hysteresis 1 --loss-scale-window 3 --clip-grad 0.05 {_SPLIT}"
    ),
    "ep4, bf16, expert bias, experts without tokens": (
        "--expert-model-parallel-size 4 --bf16 --swiglu --disable-bias-linear --moe-router-score-function sigmoid "
        f"--moe-router-enable-expert-bias --num-experts 32 --moe-router-topk 1 {_SPLIT}"
    ),
    "pp2 ep2 in four stages, bf16, distributed": (
        f"{_PP} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 --bf16 {_SPLIT}"
    ),
    "torch AdamW, foreach": f"{_DP} --bf16 {_SPLIT}",
    "torch AdamW, fused": f"{_DP} --bf16 {_SPLIT}",
    "torch Adam, fused": f"{_DP} --bf16",
    "sgd with momentum": f"{_DP} --bf16",
}
_INNER = {
    "torch AdamW, foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "torch AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "torch Adam, fused": functools.partial(torch.optim.Adam, fused=True),
}
"""Beside these: the one of the CPU device, which counts steps as Apex and Transformer Engine do."""


def main(folder: Path, store: Path, case: str, environment: Mapping[str, str]) -> int:
    """One case; whatever is raised ends the rank."""
    rank = int(environment["RANK"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    notes = Notes(folder / f"rank{rank:05d}.0.jsonl", attempt=0)
    join(folder, rank)
    with _optimizer(case):
        notes.write("case", **_case(rank, f"{CASES[case]} --hidden-dropout 0.1", store))
    dist.barrier()
    return 0


class _optimizer:
    """Another inner optimizer than the one that Megatron would take here."""

    def __init__(self, name: str) -> None:
        self._inner = _INNER.get(name)
        self._sgd = name.startswith("sgd")

    def __enter__(self) -> None:
        self._before = megatron_optimizer.Adam, model_module.OptimizerConfig
        if self._inner is not None:
            inner = self._inner
            megatron_optimizer.Adam = lambda params, adam_w_mode, **how: inner(params, **how)
        if self._sgd:
            original = model_module.OptimizerConfig
            model_module.OptimizerConfig = lambda **how: original(**how | {"optimizer": "sgd", "sgd_momentum": 0.9})

    def __exit__(self, *exc: object) -> None:
        megatron_optimizer.Adam, model_module.OptimizerConfig = self._before


def _case(rank: int, model: Model | str, store: Path) -> dict[str, Any]:
    expected, losses, skipped = _reference(rank, model)
    wrong: list[str] = []
    lost: list[int] = []
    replayed: list[int] = []
    hashes: dict[int, set[str]] = {}
    zeros = 0
    faults = list(FAULTS)
    attempt = 0
    iteration = fault = 0
    while iteration < ITERATIONS:
        trainer, attached = _start(rank, model, store, attempt)
        resumed = attached.start()
        running = attached.session.running
        state = running.adapter
        iteration = trainer.progress.iteration
        if attempt:
            assert resumed is not None
            lost.append(fault - iteration)
            replayed.append(resumed.replayed_steps)
        wrong += _differences(expected[iteration], trainer, state, f"{iteration}, recovered")
        trainer.pipeline_arguments = attached.pipeline_arguments
        while iteration < ITERATIONS and not (faults and faults[0][0] <= iteration):
            step = _iterate(trainer)
            iteration += 1
            if step["losses"] != losses[iteration]:
                wrong.append(f"{iteration}: loss")
            attached.on_step_end(iteration)
            attached.drain()
            hashes.setdefault(iteration, set()).add(state.state_hash())
        zeros = max(zeros, sum(r.is_zero for r in running.arenas.own.page.records))
        wrong += _differences(expected[iteration], trainer, state, f"{iteration}, trained")
        careless = _careless(trainer, state) if iteration == ITERATIONS else []
        fault, node = faults.pop(0) if faults else (0, None)
        dist.barrier()  # all are drained: a rank that ends may hold what another is still sending
        _end(attached)
        dist.barrier()
        if node is not None and rank == 0 and iteration < ITERATIONS:
            shutil.rmtree(store / _RUN / f"node{node}")
        dist.barrier()
        attempt += 1
    return {
        "wrong": wrong, "lost": lost, "replayed": replayed, "skipped": skipped, "zeros": zeros,
        "hashes": max(len(h) for h in hashes.values()), "attempts": attempt, "careless": careless,
    }  # fmt: skip


def _iterate(trainer: Trainer) -> dict[str, Any]:
    """An iteration: one step, except where the loop takes none or two."""
    iteration = trainer.progress.iteration + 1
    if iteration == WITHOUT_STEP:
        trainer.progress.iteration = iteration
        return {"losses": {}, "skipped": False}
    if iteration == OF_TWO_STEPS:
        _step(trainer)
        trainer.progress.iteration = iteration - 1
    return _step(trainer)


def _careless(trainer: Trainer, state: MegatronState) -> list[str | None]:
    """What is said of a loop that zeroes gradients too early, and of one that takes two steps; and of a good one."""
    assert state.step_log is not None
    found = []
    for steps, zeroed in ((1, True), (2, False), (1, False)):
        for _ in range(steps):
            trainer.train_step()
        for chunk in trainer.model if zeroed else ():
            chunk.zero_grad_buffer()
        note = state.step_log.note_step(99)
        found.append(note.problem or note.check())
    return found


def _differences(expected: Mapping[str, str], trainer: Trainer, state: MegatronState, when: str) -> list[str]:
    found = _gathered_image(trainer, state)
    return [f"{when}: {name}" for name in expected if found[name] != expected[name]]


def _reference(rank: int, model: Model | str) -> tuple[dict[int, dict[str, str]], dict[int, Any], int]:
    """Every tensor after every iteration, and every loss, of a run without checkpoints."""
    trainer = _build(rank, model)
    state = _state(trainer)
    images = {0: _gathered_image(trainer, state)}
    losses: dict[int, Any] = {}
    skipped = 0
    for iteration in range(1, ITERATIONS + 1):
        step = _iterate(trainer)
        losses[iteration] = step["losses"]
        skipped += step["skipped"]
        images[iteration] = _gathered_image(trainer, state)
    state.close()
    _tear_down()
    return images, losses, skipped


def _start(
    rank: int, model: Model | str, store: Path, attempt: int, mode: str = "exact", **settings: Any
) -> tuple[Trainer, Attached]:
    """A model with checkpoints in memory, not started; from the second attempt on it is filled with noise.

    ``settings``: of ``MoetionConfig``, those of mode ``exact`` unless they are given.
    """
    trainer = _build(rank, model)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        config=MoetionConfig(
            mode=mode,
            store=str(store),
            run_id=_RUN,
            ranks_per_node=2,
            pack_threads=1,
            timeout_s=30,
            max_stall_ms=5000,
            **(settings or {"period": PERIOD}),
        ),
        user_state=trainer.state,
    )
    if attempt:
        _scramble(trainer)
    return trainer, attached


def _end(attached: Attached) -> None:
    """The process is gone; what it held open is let go of, and nothing is finished."""
    attached.session.running.undo.close()
    attached.abandon()
    _tear_down()
