# SPDX-License-Identifier: Apache-2.0
"""Streams in any legal order: a dependency that is missing gives wrong bytes for some seed."""

from __future__ import annotations

import numpy as np
import pytest
from emulated import EmulatedBackend, Emulator, TorchCuda
from kernel_cases import POISON, make_case
from support import CHUNK_BYTES, acquire, make_packer
from training import StateOnDevice, is_right, records_of

from megatron_moetion.snapshot import reference
from megatron_moetion.store.arena import Arena

SEEDS = range(1, 41)


class PoolInTraining:
    """A pool beside a stream of training's, which writes what the pool reads before and after."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._backend = EmulatedBackend(emulator)
        self._training = emulator.stream()
        self._case = make_case(self._backend, [[(0, 5000)], [(64, 700)]], np.random.default_rng(1))

    def is_right(self, seed: int, skipped_wait: int | None = None) -> bool:
        """Capture once; whether the bytes and digests are those of the moment."""
        emulator, pool, side = self._emulator, self._backend.pool, self._backend.stream
        emulator.reset(seed)
        self._case.dst.write(np.full(self._case.dst_bytes, POISON, dtype=np.uint8))
        if skipped_wait is not None:
            emulator.skip_wait(skipped_wait)
        self._write(1)
        pool.order(side, self._training)
        ticket = pool.pack(self._case.pieces, self._case.chunks, stream=side, copy_engine_bytes=2000)
        pool.order_after(self._training, ticket)
        self._write(2)
        digests = np.zeros(2, dtype=np.uint64)
        pool.finish(ticket, digests)
        expected = [np.ones(5000, np.uint8), np.concatenate([np.zeros(64, np.uint8), np.ones(700, np.uint8)])]
        whole, right = self._case.dst.read(), True
        for (start, nbytes, *_), digest, content in zip(
            self._case.chunks.tolist(), digests.tolist(), expected, strict=True
        ):
            found = whole[start - self._case.dst.address :][:nbytes]
            right &= np.array_equal(found, content) and digest == reference.digest_chunk(content)
        emulator.drain(self._training)
        emulator.drain(side)
        return right

    def _write(self, value: int) -> None:
        for source in self._case.sources:
            self._emulator.fill(self._training, source.view, value)


def test_a_capture_is_of_its_moment_in_every_order(emulator: Emulator) -> None:
    pool = PoolInTraining(emulator)
    assert all(pool.is_right(seed) for seed in SEEDS)


@pytest.mark.parametrize(
    "skipped",
    [1, 2, 3, 4],
    ids=["pack-after-training", "copies-after-training", "digests-after-kernel", "training-after-pack"],
)
def test_every_wait_is_needed(emulator: Emulator, skipped: int) -> None:
    pool = PoolInTraining(emulator)
    assert not all(pool.is_right(seed, skipped) for seed in SEEDS)


def count_wrong_captures(
    emulator: Emulator,
    torch_cuda: TorchCuda,
    state: StateOnDevice,
    arena: Arena,
    *,
    seed: int,
    holds: bool = True,
    batch_bytes: int = 1 << 20,
) -> int:
    """Train three iterations, each captured while the next one is enqueued; the captures that are not right."""
    emulator.reset(seed)
    packer = make_packer(state.inventory, batch_bytes=batch_bytes)
    packer.adopt(arena.memory)
    wrong = 0

    def train_on() -> None:
        if holds:
            packer.hold_stream()
        state.step(torch_cuda.training, 200)

    for iteration in (1, 2, 3):
        state.backward(torch_cuda.training, iteration)
        state.step(torch_cuda.training, iteration)
        packer.freeze(b"")
        state.forward(torch_cuda.training)
        slots, targets = acquire(arena, range(len(state.inventory.units)))
        digests = packer.pack(targets, lambda: None, train_on)
        assert digests is not None
        records = records_of(arena, targets, slots, iteration, digests)
        wrong += sum(not is_right(state, arena, record) for record in records)
        arena.release(slots)
    emulator.drain(torch_cuda.training)
    packer.close()
    return wrong


@pytest.mark.parametrize("batch_bytes", [2 * CHUNK_BYTES, 1 << 20], ids=["many-batches", "one-batch"])
def test_captures_are_of_their_iteration(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena, batch_bytes: int
) -> None:
    for seed in range(1, 11):
        assert count_wrong_captures(emulator, torch_cuda, state, arena, seed=seed, batch_bytes=batch_bytes) == 0, seed


def test_a_stream_that_is_not_held_shows(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    found = [count_wrong_captures(emulator, torch_cuda, state, arena, seed=seed, holds=False) for seed in range(1, 11)]
    assert any(found)
