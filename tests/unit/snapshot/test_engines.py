# SPDX-License-Identifier: Apache-2.0
"""Which engine moves what: the choice from samples, also from noisy ones, and the samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support import WatchedPool

from megatron_moetion._C import DevicePool
from megatron_moetion.snapshot import engines
from megatron_moetion.snapshot.engines import SIZES_BYTES, Sample, chosen, crossover_bytes, measure, sample_bytes

LARGEST = SIZES_BYTES[-1]


def sample(size: int, kernel: float, engine: float) -> Sample:
    return Sample(segment_bytes=size, nbytes=256 << 20, kernel_s=kernel, copy_engine_s=engine)


def test_the_crossover_is_where_the_copy_engine_is_nowhere_much_slower_any_more() -> None:
    assert crossover_bytes([]) is None
    assert crossover_bytes([sample(4, 1, 1), sample(1, 1, 0.5), sample(2, 1, 2)]) == 4
    assert crossover_bytes([sample(1, 1, 0.9), sample(2, 1, 0.9)]) == 1


def test_the_copy_engine_is_taken_also_where_the_kernel_is_a_little_faster() -> None:
    assert crossover_bytes([sample(1, 1, 3), sample(2, 1, 1.2), sample(4, 1, 1.05)]) == 2


def test_a_copy_engine_that_is_far_slower_is_not_taken() -> None:
    assert crossover_bytes([sample(1, 1, 2), sample(2, 1, 1.7)]) is None


@pytest.mark.parametrize("seed", range(300))
def test_noise_never_takes_the_copy_engine_away_from_large_runs(seed: int) -> None:
    """Both engines reach the link; each copy costs the copy engine 2 us more. Times are off by up to 20%."""
    noise = np.random.default_rng(seed).uniform(0.8, 1.2, (len(SIZES_BYTES), 2))
    link_s = (256 << 20) / 55e9
    samples = [
        sample(size, link_s * of_kernel, (link_s + (256 << 20) / size * 2e-6) * of_engine)
        for size, (of_kernel, of_engine) in zip(SIZES_BYTES, noise.tolist(), strict=True)
    ]
    found = crossover_bytes(samples)
    assert found is not None
    assert found >= 256 << 10, "below, the copy engine takes more than twice as long"


def test_the_note_has_the_figures_of_the_choice() -> None:
    samples = [sample(LARGEST, (256 << 20) / 50e9, (256 << 20) / 55e9), sample(1 << 18, 1, 9)]
    found = chosen(samples, "cudaMemcpyBatchAsync", 4)
    assert found.copy_engine_bytes == LARGEST
    assert found.note == (
        "cudaMemcpyBatchAsync from 4096 KiB on (measured with 256 MiB in runs of 4096 KiB: 55.0 GB/s, 4 SMs 50.0 GB/s)"
    )
    assert chosen([sample(LARGEST, 1, 9)], "memcpy", 4).note.startswith("no copy engine (measured")


@pytest.mark.parametrize(
    ("free", "nbytes"),
    [
        (80 << 30, 256 << 20),
        (1 << 30, 256 << 20),
        (1000 << 20, 248 << 20),
        (128 << 20, 32 << 20),
        (127 << 20, 0),
        (0, 0),
    ],
)
def test_samples_leave_training_its_memory(free: int, nbytes: int) -> None:
    assert sample_bytes(free) == nbytes


class Timed(WatchedPool):
    """A pool whose work takes as long on its device as a test says."""

    def __init__(self, pool: DevicePool, calls: list[str], seconds: dict[int | None, list[float]]) -> None:
        super().__init__(pool, calls)
        self._seconds = seconds
        self._engine: int | None = None

    def pack(self, pieces: Any, chunks: Any, *, stream: int, copy_engine_bytes: int | None) -> int:
        self._engine = copy_engine_bytes
        self._calls.append(f"{len(chunks)} {copy_engine_bytes}")
        return self._pool.pack(pieces, chunks, stream=stream, copy_engine_bytes=copy_engine_bytes)

    def device_seconds(self, ticket: int) -> float:
        return self._seconds[self._engine].pop()


class Stand:
    """The model of a device that stands for a GPU: its pools, and memory that samples are moved from."""

    def __init__(self, seconds: dict[int | None, list[float]], nbytes: int = 2 * LARGEST, fault: str = "") -> None:
        self.calls: list[str] = []
        self.nbytes = nbytes
        self._seconds = seconds
        self._fault = fault
        self._source = np.arange(nbytes // 4, dtype=np.uint32)
        self.pool = DevicePool("model:0", rank=0, max_pieces=1, max_chunks=1)

    def make_pool(self, device: str, *, timed: bool, **options: Any) -> Any:
        assert timed
        return Timed(DevicePool("model:0", **options, fault=self._fault), self.calls, self._seconds)

    @contextmanager
    def scratch(self, device: str) -> Iterator[tuple[int, int]]:
        yield self._source.ctypes.data, self.nbytes

    def measured(self) -> engines.Engines:
        return engines.measured("cuda:0", 0, self.pool, scratch=self.scratch, make_pool=self.make_pool)


ROUNDS = 1 + engines.REPEATS


def test_both_engines_are_timed_on_the_device_at_every_size_and_the_best_of_them_counts() -> None:
    stand = Stand({
        None: [5.0 + i for i in range(ROUNDS * len(SIZES_BYTES))],
        1: [1.0 + i for i in range(ROUNDS * len(SIZES_BYTES))],
    })  # fmt: skip
    with stand.scratch("cuda:0") as (source, nbytes):
        samples = measure("cuda:0", source=source, nbytes=nbytes, stream=0, num_sms=2, make_pool=stand.make_pool)
    assert [s.segment_bytes for s in samples] == list(SIZES_BYTES)
    assert {s.nbytes for s in samples} == {2 * LARGEST}
    assert (samples[-1].kernel_s, samples[-1].copy_engine_s) == (5.0, 1.0)
    packs = [c for c in stand.calls if c[0].isdigit()]
    expected = [
        f"{2 * LARGEST // size} {engine}" for size in SIZES_BYTES for engine in (None, 1) for _ in range(ROUNDS)
    ]
    assert packs == expected


def test_a_device_that_is_measured_gets_its_own_choice() -> None:
    found = Stand({None: [1.0] * 100, 1: [1.1] * 100}).measured()
    assert found.copy_engine_bytes == SIZES_BYTES[0]
    assert "memcpy from 64 KiB on (measured with 8 MiB" in found.note


def test_what_cannot_be_measured_gets_the_usual_choice_and_says_why() -> None:
    """Never no copy engine at all, and never an error of a device that works otherwise."""
    failed = Stand({}, fault="launch").measured()
    assert failed.copy_engine_bytes == engines.USUAL_BYTES
    assert "memcpy from 1024 KiB on (not measured: " in failed.note
    assert "kernel launch" in failed.note
    assert Stand({}, nbytes=0).measured().note.endswith("(not measured: too little free memory)")


def test_a_model_of_a_device_is_not_measured() -> None:
    pool = DevicePool("model:0", rank=0, max_pieces=1, max_chunks=1)
    assert engines.measured("model:0", 0, pool).note == "no copy engine"
