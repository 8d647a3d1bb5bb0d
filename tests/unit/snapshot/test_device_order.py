# SPDX-License-Identifier: Apache-2.0
"""The order of a packer's work and training's, on a model of a device whose streams run when they are asked for.

Each seed is another order of those that streams and events allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import POOL, make_packer

from megatron_moetion._C import DevicePool
from megatron_moetion.snapshot.digest import is_intact
from megatron_moetion.snapshot.engines import Engines
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.units import Inventory, Region, Role, Unit, UnitKind

SEEDS = range(1, 41)
TRAINING = 0
"""The stream that training enqueues on."""
OURS = 1
COPY_ENGINE = Engines(copy_engine_bytes=1, note="a copy engine for all")
ROOM = 1024
CHUNK_BYTES = 4096


def unit(name: str, kind: UnitKind, role: Role, data: np.ndarray, *, at_once: bool) -> Unit:
    region = Region(
        unit=name, tensor=name, role=role, dtype="uint8", start=0, nbytes=data.nbytes, address=data.ctypes.data,
        device="model:0", at_once=at_once,
    )  # fmt: skip
    return Unit(name=name, kind=kind, regions=(region,))


class Run:
    """Iterations of a training loop, each with a snapshot of its weights, its gradients and a counter."""

    def __init__(self, seed: int, *, fault: str = "", engines: Engines | None = None) -> None:
        self.weights = np.zeros(99_968, dtype=np.uint8)
        self.gradients = np.zeros(60_032, dtype=np.uint8)
        self.counter = np.zeros(64, dtype=np.uint8)
        units = (
            unit("weights", UnitKind.DENSE, Role.MASTER, self.weights, at_once=False),
            unit("gradients", UnitKind.LOG, Role.GRAD, self.gradients, at_once=True),
            unit("counter", UnitKind.DENSE, Role.BUFFER, self.counter, at_once=True),
        )
        self.packer = make_packer(
            Inventory(units=units), batch_bytes=20_000, seed=seed, fault=fault, watch=self.watch, engines=engines
        )
        sizes = np.array([u.nbytes for u in units], dtype=np.int64)
        self.arena = np.zeros(int(sizes.sum()) + ROOM * len(units), dtype=np.uint8)
        starts = np.cumsum(sizes + ROOM) - sizes - ROOM
        self.targets = Targets.in_slots(np.arange(len(units)), self.arena.ctypes.data + starts, sizes)
        self.spans = list(zip(starts.tolist(), sizes.tolist(), strict=True))
        self.packer.adopt(self.arena)
        self.hold: Callable[[], None] = self.packer.hold_stream
        self.wrong = 0

    def watch(self, pool: DevicePool) -> DevicePool:
        self.pool = pool
        return pool

    def write(self, data: np.ndarray, value: int) -> None:
        """As a kernel of training's does: some time, in the order of its stream."""
        self.pool.model_fill(TRAINING, data.ctypes.data, value, data.nbytes)

    def step(self, iteration: int) -> None:
        """The optimizer steps; a snapshot is taken; the next iteration begins, and its optimizer steps."""
        for data in (self.gradients, self.weights, self.counter):
            self.write(data, iteration)
        self.packer.freeze(b"")
        for data in (self.gradients, self.counter):
            self.write(data, 0xEE)

        def live_is_read() -> None:
            self.hold()
            self.write(self.weights, 0xEE)

        self.arena[:] = 0
        assert self.packer.zero_logs((1,)) == frozenset()
        live = self.packer.pack(self.targets[:1], lambda: None, live_is_read)
        copies = self.packer.pack(self.targets[1:], lambda: None)
        assert live is not None
        assert copies is not None
        for number, (start, nbytes) in enumerate(self.spans):
            found = self.arena[start : start + nbytes]
            digests = self.arena[start + nbytes :][: 8 * -(-nbytes // CHUNK_BYTES)].view(np.uint64)
            expected = int([*live, *copies][number])
            self.wrong += not (found == iteration).all() or not is_intact(POOL, CHUNK_BYTES, found, digests, expected)


def wrong_captures(change: Callable[[Run], None] = lambda run: None, **options: Any) -> int:
    wrong = 0
    for seed in SEEDS:
        run = Run(seed, **options)
        change(run)
        try:
            for iteration in range(1, 5):
                run.step(iteration)
        finally:
            for stream in (TRAINING, OURS):  # what is enqueued writes memory of this run
                run.pool.model_sync(stream)
        wrong += run.wrong
    return wrong


@pytest.mark.parametrize("engines", [None, COPY_ENGINE])
def test_a_capture_holds_what_training_had_written_at_the_freeze_in_every_order(engines: Engines | None) -> None:
    assert wrong_captures(engines=engines) == 0


@pytest.mark.parametrize("engines", [None, COPY_ENGINE])
def test_without_holding_trainings_stream_some_order_shows_the_next_step(engines: Engines | None) -> None:
    def change(run: Run) -> None:
        run.hold = lambda: None

    assert wrong_captures(change=change, engines=engines) > 0


def test_a_stream_that_is_held_and_does_not_wait_is_seen() -> None:
    """Of a snapshot without a copy engine that is the only wait of a stream for another one."""
    assert wrong_captures(fault="no-wait") > 0


def test_a_packer_that_does_not_settle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(run: Run) -> None:
        monkeypatch.setattr(run.packer, "settle", lambda: True)

    with pytest.raises((AssertionError, ValueError)):
        wrong_captures(change=change)
