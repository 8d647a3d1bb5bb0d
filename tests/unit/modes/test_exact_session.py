# SPDX-License-Identifier: Apache-2.0
"""Mode ``exact`` in sessions of two ranks: what one rank lacks is its own affair, and all comes back bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_job import Adapter, Job

from megatron_moetion.framework import StepNote
from megatron_moetion.units import Inventory, Region, Role, Unit, UnitKind

PERIOD = 4
STEPS_OF = {8: 0, 9: 0, 13: 2, 18: 0, 20: 3}
"""Optimizer steps of these iterations, on all ranks; others have one."""


class Descender(Adapter):
    """A state that moves along gradients with momentum, in none, one or several steps an iteration."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.momenta = {name: np.zeros_like(array) for name, array in self.arrays.items()}
        self.gradients = {name: np.zeros_like(array) for name, array in self.arrays.items()}
        self.num_steps = 0
        self.skipped: list[int] = []

    def inventory(self) -> Inventory:
        return Inventory(units=tuple(self._with_optimizer(u) for u in super().inventory().units))

    def _with_optimizer(self, unit: Unit) -> Unit:
        if unit.kind is UnitKind.HOST:
            return unit
        master = next(r for r in unit.regions if r.role is Role.MASTER)
        more = [
            Region(**{**vars(master), "role": role, "address": arrays[master.tensor].ctypes.data, "at_once": at_once})
            for role, arrays, at_once in ((Role.EXP_AVG, self.momenta, False), (Role.GRAD, self.gradients, True))
        ]
        return replace(unit, regions=(*unit.regions, *more))

    def host_state(self) -> dict[str, Any]:
        return {**super().host_state(), "skipped": self.skipped[-20:]}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        super().load_host_state({k: v for k, v in state.items() if k != "skipped"})

    def step(self, iteration: int) -> None:
        for number in range(STEPS_OF.get(iteration, 1)):
            draw = np.random.default_rng((iteration, number, self.rank))
            for name, gradient in self.gradients.items():
                gradient[:] = draw.normal(size=gradient.shape) + 0.01 * self.arrays[name]
            self.apply(iteration)
            self.num_steps += 1
        self.counts += 1
        self.host = {"iteration": iteration, "rng": bytes([iteration % 256]) * 100}

    def apply(self, iteration: int) -> None:
        for name, momentum in self.momenta.items():
            momentum *= np.float32(0.9)
            momentum += self.gradients[name]
            self.arrays[name] -= np.float32(0.1 / (1 + iteration)) * momentum

    def image(self) -> bytes:
        return super().image() + b"".join(a.tobytes() for a in self.momenta.values())

    # -- StepReplayer

    @property
    def bytes_a_step(self) -> int:
        return 32

    def remember(self, steps: int) -> None: ...

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        taken, self.num_steps = self.num_steps, 0
        if not taken:
            self.skipped.append(iteration)
            return StepNote(skipped=True)
        return StepNote(problem=f"{taken} steps" if taken > 1 else None)

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        self.skipped = list(state["skipped"])

    def replay(self, iteration: int) -> bool:
        if iteration in self.skipped:
            return False
        self.apply(iteration)
        return True


def job(folder: Path, attempt: int = 0) -> Job:
    found = Job(folder, attempt, state=Descender, mode="exact", period=PERIOD)
    found.start()
    return found


def images(folder: Path, steps: int) -> list[list[bytes]]:
    """All ranks' states after each iteration, of a job that nothing happens to."""
    run = job(folder)
    found = [[s.image() for s in run.states], *(run.train(1) for _ in range(steps))]
    run.crash()
    return found


@pytest.mark.parametrize("fault", [9, 10, 13, 14, 15, 18, 20, 22])
def test_iterations_of_no_step_and_of_several_are_no_hole(tmp_path: Path, fault: int) -> None:
    expected = images(tmp_path / "reference", fault)
    run = job(tmp_path / "run")
    run.train(fault)
    run.crash()
    again = job(tmp_path / "run", attempt=1)
    assert fault - again.iteration <= 1
    assert [s.image() for s in again.states] == expected[again.iteration]
    assert again.train(fault - again.iteration) == expected[fault]
    again.crash()


def test_a_dropped_snapshot_is_that_ranks_own_affair(tmp_path: Path) -> None:
    expected = images(tmp_path / "reference", 12)
    run = job(tmp_path / "run")
    run.train(5)
    run.disturbances[0].pack = lambda: False
    run.train(1)
    run.disturbances[0].pack = None
    run.train(6)
    counts = [s.running.pipeline.counts for s in run.sessions]
    assert counts[1].dropped == {}
    assert counts[1].committed == 12
    assert sum(counts[0].dropped.values()) == 1
    assert run.sessions[1].stable_iteration >= 10
    run.crash()
    again = job(tmp_path / "run", attempt=1)
    assert again.iteration == 12
    assert again.train(0) == expected[12]
    again.crash()
