# SPDX-License-Identifier: Apache-2.0
"""Trains all arms of one model and seed in this process, one rank; a fault is a new trainer that recovers from memory.

At a fault everything that was trained is thrown away: model, optimizer and random states are built anew from
another seed, and only what the arena holds comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.router import TopKRouter

from benchmarks.accuracy_under_faults.repayable import Loads, share_repaid
from benchmarks.accuracy_under_faults.study import (
    FIXED_FAULTS,
    SEEDS,
    TRAIN_ITERATIONS,
    VALIDATE_EVERY,
    VALIDATION_BATCHES,
    Arm,
    Model,
    arms,
)
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import moetion_config, parse_arguments
from megatron_moetion.mcore.attach import attach
from megatron_moetion.mcore.router import CapacityRouter, Counts
from megatron_moetion.pretrain.corpus import Split
from megatron_moetion.pretrain.loop import Trainer
from megatron_moetion.pretrain.process import Process
from megatron_moetion.pretrain.report import Reporter
from megatron_moetion.pretrain.startup import build_source, initialize

WRONG_SEED = 987_654


def main(model: Model, seed: int, folder: Path, only: Sequence[str], iterations: int = TRAIN_ITERATIONS) -> None:
    """Train what ``folder`` has no result of yet; each arm's result is a file of its own."""
    start(model, seed)
    source = build_source(_arguments(model, seed, ""))
    for arm in arms(model, seed):
        path = folder / f"{model.name}-{seed}-{arm.name}.json"
        if path.exists() or (only and arm.name not in only):
            continue
        found = Run(model, seed, arm, source, iterations).result()
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(found) + "\n")
        scratch.rename(path)
        print(f"{model.name} seed {seed} {arm.name}: loss {found['loss']:.4f}, PLT {found['plt']:.2%}, "
              f"{found['seconds']:.0f} s", flush=True)  # fmt: skip


def start(model: Model, seed: int) -> None:
    """Once a process, before anything is trained; models of one batch size may follow each other."""
    torch.set_num_threads(1)
    initialize(_arguments(model, seed, ""), Process(rank=0, world_size=1, local_rank=0, local_world_size=1))


def loads_of(model: Model, iterations: int) -> Loads:
    """Tokens routed in a run without faults."""
    source = build_source(_arguments(model, SEEDS[0], ""))
    run = Run(model, SEEDS[0], arms(model, SEEDS[0])[0], source, iterations)
    run.result()
    return np.array(run.trace)


def _arguments(model: Model, seed: int, flags: str) -> Any:
    # The flag gives the model a router that counts, in all arms alike.
    text = f"{model.flags} --seed {seed} --moetion --moetion-mode popularity --moetion-replicas 0 {flags}"
    return parse_arguments(text.split(), Machine.here(1, False))


def _count(counts: Counts, routed: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        counts.add(routed, routed, 0)


class Run:
    """One training run."""

    def __init__(self, model: Model, seed: int, arm: Arm, source: Any, iterations: int) -> None:
        self._model, self._seed, self._arm = model, seed, arm
        self._source, self._iterations = source, iterations
        self._store = Path(f"/dev/shm/moetion-accuracy-{os.getpid()}")
        self._events = self._store / "events.jsonl"
        flags = f"--moetion-run-id run --moetion-store {self._store} --moetion-report {self._events}"
        self._args = _arguments(model, seed, f"{flags} {arm.flags or ''}")
        self._session: Any = None
        self._attempt = 0
        self._moments: list[torch.Tensor] = []
        self.trace: list[list[list[float]]] = []
        """Of a run without faults: tokens routed, [iterations, layers, experts]."""
        self._trainer = self._build(seed)

    def result(self) -> dict[str, Any]:
        """Train to the end, with faults on the way."""
        began = time.perf_counter()
        curve: dict[int, float] = {}
        losses: dict[int, float] = {}
        faults = [f for f in self._arm.faults if f < self._iterations]
        counts = self._count_loads() if self._arm.flags is None else []
        try:
            self._attach()
            while self._trainer.progress.iteration < self._iterations:
                step = self._trainer.train_step()
                iteration = self._trainer.progress.iteration
                if faults and iteration > faults[0]:
                    faults.pop(0)
                    self._fail()
                    continue
                if self._session is not None:
                    self._session.on_step_end(iteration)
                if self._arm.current_moments and iteration in self._arm.faults:
                    self._moments = [tensor.clone() for tensor in self._live_moments()]
                self.trace.append([c.routed.tolist() for c in counts])
                for c in counts:
                    c.routed.zero_()
                losses[iteration] = step.losses["lm loss"]
                if iteration % VALIDATE_EVERY == 0 or iteration == self._iterations:
                    curve[iteration] = self._validate()
            self._end()
            return {
                "model": self._model.name,
                "arm": self._arm.name,
                "seed": self._seed,
                "faults": list(self._arm.faults),
                "loss": curve[self._iterations],
                "curve": curve,
                "training_losses": [losses[i] for i in sorted(losses)] if self._is_confirmed else [],
                "loads": self._loads_of_layers(),
                "seconds": time.perf_counter() - began,
                **self._told(),
                **self._repayable(),
            }
        finally:
            shutil.rmtree(self._store, ignore_errors=True)

    @property
    def _is_confirmed(self) -> bool:
        """Whether ``confirm.py`` compares this run's losses."""
        return self._arm.name == "default" and self._seed == SEEDS[0]

    def _build(self, seed: int) -> Trainer:
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        trainer = Trainer(self._args, self._source, Reporter(self._args, active=False, attempt=0))
        for chunk in trainer.model:
            chunk.train()
        return trainer

    def _attach(self) -> None:
        if self._arm.flags is None:
            return
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(self._attempt)
        trainer = self._trainer
        self._session = attach(
            model=trainer.model,
            optimizer=trainer.optimizer,
            opt_param_scheduler=trainer.scheduler,
            config=moetion_config(self._args),
            user_state=trainer.progress,
        )
        self._session.start()

    def _fail(self) -> None:
        self._end()
        self._attempt += 1
        self._trainer = self._build(WRONG_SEED + self._attempt)
        self._attach()
        for live, kept in zip(self._live_moments(), self._moments, strict=False):
            live.copy_(kept)

    def _live_moments(self) -> Iterator[torch.Tensor]:
        """Both moments of every parameter, always in the same order."""
        for link in self._trainer.optimizer.chained_optimizers:
            for group in link.optimizer.param_groups:
                for parameter in group["params"]:
                    state = link.optimizer.state[parameter]
                    yield from (state["exp_avg"], state["exp_avg_sq"])

    def _end(self) -> None:
        if self._session is not None:
            self._session.close()

    def _routers(self) -> list[TopKRouter]:
        return [m for chunk in self._trainer.model for m in chunk.modules() if isinstance(m, TopKRouter)]

    def _count_loads(self) -> list[Counts]:
        """Of a run without a session: what its routers route from here on, a layer each."""
        found = []
        for router in self._routers():
            counts = Counts(torch.zeros(Counts.ROWS, self._model.experts, dtype=torch.float64))
            if isinstance(router, CapacityRouter):
                router.counts = counts
            else:  # drops nothing
                router.register_forward_hook(lambda module, inputs, output, to=counts: _count(to, output[1]))
            found.append(counts)
        return found

    def _repayable(self) -> dict[str, Any]:
        """Of a run without faults: what raised capacities could have made up for, had there been faults."""
        factor = self._model.capacity_factor
        if self._arm.flags is not None or factor is None:
            return {}
        loads = np.array(self.trace)
        found = {}
        for policy in ("unsaved-tokens", "sequential"):
            for name, own in (("own debt", True), ("load", False)):
                cap = 32
                k = 2 * -(-2 * self._model.experts // cap)
                found[f"{policy}, by {name}"] = share_repaid(loads, factor, FIXED_FAULTS, k, cap, policy, own)
        return {"repayable": found}

    def _validate(self) -> float:
        """Mean loss of the same batches each time; nothing of training moves."""
        for chunk in self._trainer.model:
            chunk.eval()
        total = 0.0
        with torch.no_grad():
            for batch in range(VALIDATION_BATCHES):
                consumed = batch * self._args.global_batch_size
                found = self._trainer._run_schedule(Split.VALIDATION, consumed, forward_only=True)
                total += float(found[0]["lm loss"])
        for chunk in self._trainer.model:
            chunk.train()
        return total / VALIDATION_BATCHES

    def _loads_of_layers(self) -> list[list[float]]:
        """Per layer, tokens routed to each expert, as the final weights route the validation set."""
        seen: list[torch.Tensor] = []

        def count(module: Any, inputs: Any, output: Any) -> None:
            seen.append(output[1].sum(dim=0))

        routers = self._routers()
        handles = [router.register_forward_hook(count) for router in routers]
        factors = [getattr(router, "factor", None) for router in routers]
        for router in routers:
            router.factor = None
        self._validate()
        for router, factor, handle in zip(routers, factors, handles, strict=True):
            router.factor = factor
            handle.remove()
        layers = len(routers)
        return [torch.stack(seen[layer::layers]).sum(dim=0).tolist() for layer in range(layers)]

    def _told(self) -> dict[str, Any]:
        """What the session's report says."""
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        events = [json.loads(line) for line in lines]
        recovered = [e for e in events if e["event"] == "recovered"]
        summaries = [e for e in events if e["event"] == "summary"]
        if not summaries:
            return {"plt": 0.0, "recoveries": 0}
        committed = sum(s["snapshots"] for s in summaries)
        return {
            "plt": max(e["plt"] for e in (*recovered, *summaries)),
            "plt_at_end": summaries[-1]["plt"],
            "recoveries": len(recovered),
            "lost_tokens": sum(e["lost_tokens"] for e in recovered),
            "bytes": sum(s["snapshot_bytes_mean"] * s["snapshots"] for s in summaries) / max(committed, 1),
            "bytes_full": summaries[-1]["snapshot_bytes_full"],
            "dropped_snapshots": sum(s["dropped"] for s in summaries),
            "layer_tokens": [
                {k: e[k] for k in ("when", "iteration", "layers")} for e in events if e["event"] == "layer_tokens"
            ],
        }
