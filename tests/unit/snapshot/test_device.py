# SPDX-License-Identifier: Apache-2.0
"""State in device memory: captured and written back as state on the host is. ``model:0`` stands for the device."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import CHUNK_BYTES, POOL, WatchedPool, make_packer

from megatron_moetion import _C
from megatron_moetion.errors import DeviceFault, UnsupportedState
from megatron_moetion.snapshot.digest import is_intact
from megatron_moetion.snapshot.host_state import encode
from megatron_moetion.snapshot.packer import Packer, device_packer
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

Pool = _C.DevicePool
ROOM = 1024
"""Behind each capture, for its chunk digests; more than they need."""
packer_for = partial(make_packer, batch_bytes=20_000)  # so that several batches are in flight


def region(unit: str, name: str, data: np.ndarray, device: str, at_once: bool = False) -> Region:
    return Region(
        unit=unit, tensor=name, role=Role.MASTER, dtype="uint8", start=0, nbytes=data.nbytes, address=data.ctypes.data,
        device=device, at_once=at_once,
    )  # fmt: skip


class State:
    """Three units on a device, one of them larger than a batch, one on the host, and a counter that cannot wait."""

    def __init__(self, device: str) -> None:
        rng = np.random.default_rng(5)
        self.big = rng.integers(0, 256, 200_345, dtype=np.uint8)
        self.small = [rng.integers(0, 256, n, dtype=np.uint8) for n in (9_001, 17, 30_000)]
        self.counter = np.array([3, 1, 4], dtype=np.int64)
        dense = UnitKind.DENSE
        units = [Unit(name="big", kind=dense, regions=(region("big", "w", self.big, device),))]
        for number, data in enumerate(self.small):
            name = f"small{number}"
            where = "cpu" if number == 1 else device
            regions = [region(name, "w", data, where)]
            if number == 0:
                regions.append(region(name, "n", self.counter, device, at_once=True))
            units.append(Unit(name=name, kind=dense, regions=tuple(regions)))
        units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=256))
        self.inventory = Inventory(units=tuple(units))

    def live(self) -> list[np.ndarray]:
        return [self.big, *self.small]


def targets_in(memory: np.ndarray, inventory: Inventory) -> Targets:
    """Captures one behind the other, each followed by its chunk digests."""
    sizes = np.array([u.nbytes for u in inventory.units], dtype=np.int64)
    starts = np.cumsum(sizes + ROOM) - sizes - ROOM
    return Targets.in_slots(np.arange(len(sizes)), memory.ctypes.data + starts, sizes)


def captured(memory: np.ndarray, targets: Targets, number: int, nbytes: int) -> np.ndarray:
    at = int(targets.addresses[number]) - memory.ctypes.data
    return memory[at : at + nbytes]


def is_right(memory: np.ndarray, targets: Targets, number: int, nbytes: int, digest: int) -> bool:
    at = int(targets.digests[number]) - memory.ctypes.data
    digests = memory[at : at + 8 * -(-nbytes // CHUNK_BYTES)].view(np.uint64)
    return is_intact(POOL, CHUNK_BYTES, captured(memory, targets, number, nbytes), digests, digest)


def arena_for(inventory: Inventory) -> np.ndarray:
    return np.full(sum(u.nbytes + ROOM for u in inventory.units), 0xA5, dtype=np.uint8)


def round_trip(device: str, adopt: bool, fault: str = "") -> tuple[bytes, list[int]]:
    """Freeze, move on what may move on, pack, forget, write back; the arena's bytes and the capture digests."""
    state = State(device)
    packer = packer_for(state.inventory, 2, fault=fault)
    arena = arena_for(state.inventory)
    if adopt:
        packer.adopt(arena)
    packer.freeze(encode({"iteration": 7}))
    state.counter[:] = -1
    targets = targets_in(arena, state.inventory)
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    expected = [a.copy() for a in state.live()]
    for array in state.live():
        array[:] = 0
    for number, unit in enumerate(state.inventory.units[:-1]):
        assert is_right(arena, targets, number, unit.nbytes, int(digests[number]))
        packer.scatter(number, captured(arena, targets, number, unit.nbytes))
    for array, before in zip(state.live(), expected, strict=True):
        assert (array == before).all()
    assert state.counter.tolist() == [3, 1, 4]
    packer.close()
    return arena.tobytes(), digests.tolist()


def test_the_same_capture_as_from_host_memory_and_back() -> None:
    assert round_trip("model:0", adopt=True) == round_trip("cpu", adopt=True)


def test_by_way_of_a_buffer_where_no_arena_was_adopted() -> None:
    assert round_trip("model:0", adopt=False) == round_trip("cpu", adopt=False)


def test_an_arena_that_cannot_be_pinned_is_reached_by_a_bounded_buffer_and_said_so() -> None:
    assert round_trip("model:0", adopt=True, fault="register") == round_trip("cpu", adopt=True)
    state = State("model:0")
    packer = packer_for(state.inventory, fault="register")
    packer.adopt(arena_for(state.inventory))
    assert "could not be pinned (rank 0: registration of" in packer.note


def test_a_pinned_arena_is_said_so() -> None:
    state = State("model:0")
    packer = packer_for(state.inventory)
    assert packer.note == ""
    packer.adopt(arena_for(state.inventory))
    assert packer.note == "arena pinned; captures land in it, packed on 4 SMs, no copy engine"
    assert packer_for(State("cpu").inventory).note == ""


def test_a_device_that_fails_is_named_with_rank_and_ranges_and_not_used_again() -> None:
    state = State("model:0")
    packer = packer_for(state.inventory, rank=3, fault="launch")
    source = f"{state.counter.ctypes.data:#x}"
    for _ in range(2):
        with pytest.raises(DeviceFault, match=rf"rank 3: scatter of 1 pieces from \[{source}, .* on model failed: ker"):
            packer.freeze(b"")
    arena = arena_for(state.inventory)
    packer.adopt(arena)
    with pytest.raises(DeviceFault, match=r"rank 3: scatter .* invalid device function"):
        packer.pack(targets_in(arena, state.inventory), lambda: None)


def test_a_cancelled_pack_waits_for_nothing_and_may_be_repeated() -> None:
    state = State("model:0")
    packer = packer_for(state.inventory)
    arena = arena_for(state.inventory)
    packer.adopt(arena)
    packer.freeze(encode({}))
    batches: list[int] = []

    def cancel_after_two() -> None:
        batches.append(1)
        if len(batches) == 2:
            packer.cancel()

    assert packer.pack(targets_in(arena, state.inventory), cancel_after_two) is None
    assert len(batches) == 2  # the host's, and the one that was waited for
    packer.allow()
    assert packer.pack(targets_in(arena, state.inventory), lambda: None) is not None


def test_two_devices_and_split_units_are_refused() -> None:
    data = np.zeros(64, dtype=np.uint8)

    def unit(name: str, *devices: str) -> Unit:
        regions = tuple(region(name, f"w{i}", data, device) for i, device in enumerate(devices))
        return Unit(name=name, kind=UnitKind.DENSE, regions=regions)

    with pytest.raises(UnsupportedState, match="several devices: cuda:0, cuda:1"):
        device_packer(Inventory(units=(unit("a", "cuda:0"), unit("b", "cuda:1"))), CHUNK_BYTES)
    with pytest.raises(UnsupportedState, match="unit a lies partly in host memory and partly on model:0"):
        device_packer(Inventory(units=(unit("a", "model:0", "cpu"),)), CHUNK_BYTES)


def test_a_gpu_that_is_not_there_is_an_error_that_says_so() -> None:
    data = np.zeros(64, dtype=np.uint8)
    units = (Unit(name="a", kind=UnitKind.DENSE, regions=(region("a", "w", data, "cuda:977"),)),)
    with pytest.raises(DeviceFault, match=r"no CUDA kernels|CUDA devices: |cuda:977 is not there"):
        device_packer(Inventory(units=units), CHUNK_BYTES)


# -- the pool behind it --------------------------------------------------------------------------------------


def one_chunk(nbytes: int = 100) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    source, target = np.arange(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
    pieces = np.array([(source.ctypes.data, target.ctypes.data, nbytes)], np.int64)
    return pieces, np.array([(target.ctypes.data, nbytes, 0, 1)], np.int64), (source, target)


def test_tickets_are_bounded_and_finished_once() -> None:
    pool = Pool("model:0", rank=0, max_pieces=4, max_chunks=4, num_slots=2)
    pieces, chunks, keep = one_chunk()
    first, second = pool.pack(pieces, chunks), pool.pack(pieces, chunks)
    assert first != second
    assert pool.wait(first, timeout_s=0)
    with pytest.raises(ValueError, match="all 2 slots of the pool are in use"):
        pool.pack(pieces, chunks)
    with pytest.raises(ValueError, match="array of 1, one for each chunk"):
        pool.finish(first, np.zeros(2, np.uint64))
    pool.finish(first)
    with pytest.raises(ValueError, match=f"ticket {first} is not one of this pool's"):
        pool.finish(first)
    assert pool.pack(pieces, chunks) > second
    assert (keep[0] == keep[1]).all()


def test_what_does_not_fit_the_tables_is_refused_with_the_numbers() -> None:
    pool = Pool("model:0", rank=0, max_pieces=1, max_chunks=1)
    pieces, chunks, _ = one_chunk()
    with pytest.raises(ValueError, match=r"pack of 2 pieces in 1 rows; this pool was made for 1 pieces and 1 rows"):
        pool.pack(np.concatenate([pieces, pieces]), chunks)


def test_uploaded_pieces_are_checked_like_those_that_are_brought() -> None:
    pool = Pool("model:0", rank=8, max_pieces=4, max_chunks=4)
    source, target = np.arange(64, dtype=np.uint8), np.zeros(192, dtype=np.uint8)
    address = target.ctypes.data
    with pytest.raises(ValueError, match=r"rank 8: chunk 0: first_piece=0, num_pieces=1; there are 0 pieces"):
        pool.pack_uploaded(np.array([(address, 64, 0, 1, 64)], np.int64))
    pool.upload_pieces(np.array([(source.ctypes.data, 1000, 64)], np.int64))
    with pytest.raises(ValueError, match=r"piece 0: dst=0x3e8"):
        pool.pack_uploaded(np.array([(address, 64, 0, 1, 999)], np.int64))
    with pytest.raises(ValueError, match=r"chunks 0 and 1 overlap"):
        pool.pack_uploaded(np.array([(address, 64, 0, 1, 1000), (address + 63, 64, 0, 0, 2000)], np.int64))
    ticket = pool.pack_uploaded(np.array([(address + 64, 64, 0, 1, 1000)], np.int64))
    with pytest.raises(ValueError, match="finish all tickets before other pieces are uploaded"):
        pool.upload_pieces(np.zeros((0, 3), np.int64))
    pool.finish(ticket)
    assert target.tolist() == [0] * 64 + source.tolist() + [0] * 64


@pytest.mark.parametrize("limit", [1, 299, 300, 301, 1000])
def test_only_runs_contiguous_at_both_ends_and_long_enough_go_to_the_copy_engine(limit: int) -> None:
    source, target = np.arange(2000, dtype=np.uint32).view(np.uint8), np.zeros(4000, dtype=np.uint8)
    src, dst = source.ctypes.data, target.ctypes.data
    rows = [  # source, destination, bytes; runs of 100, 300, 100, 100, 200 bytes
        (0, 0, 100),
        (500, 100, 100), (600, 200, 100), (700, 300, 100),
        (800, 500, 100),  # contiguous at the source only
        (1000, 600, 100),  # at the destination only
        (3000, 1000, 150), (3150, 1150, 50),
    ]  # fmt: skip
    pieces = np.array([(src + s, dst + d, n) for s, d, n in rows], np.int64)
    chunks = np.array([(dst + d, n, i, 1) for i, (_, d, n) in enumerate(rows)], np.int64)
    pool = Pool("model:0", rank=0, max_pieces=8, max_chunks=8)
    pool.finish(pool.pack(pieces, chunks, copy_engine_bytes=limit))
    expected = np.zeros_like(target)
    for s, d, n in rows:
        expected[d : d + n] = source[s : s + n]
    assert (target == expected).all()
    runs = [pieces[:1], pieces[1:4], pieces[4:5], pieces[5:6], pieces[6:]]
    for run in runs:  # a scatter without a launch: the copy engine moved all of it
        unable = Pool("model:0", rank=0, max_pieces=8, max_chunks=8, fault="launch")
        if run[:, 2].sum() >= limit:
            unable.finish(unable.scatter(run, copy_engine_bytes=limit))
        else:
            with pytest.raises(_C.DeviceError, match="kernel launch"):
                unable.scatter(run, copy_engine_bytes=limit)


def test_work_that_is_late_is_named_and_breaks_nothing() -> None:
    pool = Pool("model:0", rank=5, max_pieces=4, max_chunks=4, num_slots=2, fault="late")
    pieces, chunks, keep = one_chunk()
    ticket = pool.pack(pieces, chunks)
    assert not pool.wait(ticket, timeout_s=0)
    late = rf"rank 5: pack of 1 pieces from \[{keep[0].ctypes.data:#x}.* on model is not done after 0 s"
    for _ in range(2):
        with pytest.raises(_C.DeviceLate, match=late):
            pool.finish(ticket, timeout_s=0)
    other = pool.pack(pieces, chunks)
    with pytest.raises(ValueError, match="all 2 slots of the pool are in use"):  # the device may still read its memory
        pool.pack(pieces, chunks)
    assert pool.wait(ticket, timeout_s=60)
    digests = np.zeros(1, np.uint64)
    pool.finish(ticket, digests)
    assert digests[0]
    pool.finish(other)
    pool.finish(pool.pack(pieces, chunks))


def test_what_was_read_while_a_stream_could_not_be_made_to_wait_is_not_trusted() -> None:
    pool = Pool("model:0", rank=2, max_pieces=4, max_chunks=4, fault="wait:2")
    pieces, chunks, _keep = one_chunk()
    ticket = pool.pack(pieces, chunks)
    with pytest.raises(_C.DeviceError, match=r"rank 2: pack of 1 pieces .* cudaStreamWaitEvent"):
        pool.order_after(0, ticket)
    with pytest.raises(_C.DeviceError, match="cudaStreamWaitEvent"):
        pool.finish(ticket)


@pytest.mark.parametrize("device", ["cuda", "cuda:", "cuda:x", "cuda:-1", "tpu:0", ""])
def test_devices_have_a_kind_and_a_number(device: str) -> None:
    with pytest.raises(ValueError, match=r"it must be cuda:N or model:N"):
        Pool(device, rank=0, max_pieces=1, max_chunks=1)


def test_pinned_memory_outlives_its_pool() -> None:
    memory = Pool("model:0", rank=0, max_pieces=1, max_chunks=1).pinned(4096)
    view = memory[10:20]
    del memory
    view[:] = 7
    assert view.sum() == 70


# -- what training waits for ---------------------------------------------------------------------------------


def watched(state: State) -> tuple[Packer, WatchedPool, list[str], Targets]:
    calls = list[str]()
    memory = arena_for(state.inventory)
    pools: list[WatchedPool] = []

    def watch(pool: _C.DevicePool) -> WatchedPool:
        pools.append(WatchedPool(pool, calls, memory, state))
        return pools[0]

    packer = packer_for(state.inventory, watch=watch)
    packer.adopt(memory)
    packer.freeze(encode({}))
    assert packer.settle()
    calls.clear()
    return packer, pools[0], calls, targets_in(memory, state.inventory)


def test_live_state_is_given_away_when_the_last_batch_is_on_its_way_and_the_stream_waits_for_that_one() -> None:
    packer, _, calls, targets = watched(State("model:0"))

    def given() -> None:
        calls.append("given")
        packer.hold_stream()

    assert packer.pack(targets, lambda: calls.append("between"), given) is not None
    at = calls.index("given")
    last = max(int(c.split()[1]) for c in calls if c.startswith("pack_uploaded"))
    assert calls[at + 1] == f"order_after {(0, last)}"
    assert not any(c.startswith("pack_uploaded") for c in calls[at:]), "all was enqueued before"
    assert calls.count("between") > 2
    assert f"finish {(last,)}" in calls[at:], "and the last batch was still in pipeline"
    calls.clear()
    assert packer.pack(targets[:1], lambda: None) is not None  # from copies: training need not wait for them
    packer.hold_stream()
    assert calls[-1] == f"order_after {(0, last)}", "which is done, so that nothing is waited for"


def test_a_pack_that_was_cancelled_gives_nothing_away() -> None:
    packer, _, calls, targets = watched(State("model:0"))
    is_on_host = np.isin(targets.units, (2, 4))
    on_host, on_device = targets[is_on_host], targets[~is_on_host]
    assert packer.pack(on_device, packer.cancel, lambda: calls.append("given")) is None
    assert "given" not in calls, "the first batch was landed, the second was in pipeline, the third was never enqueued"
    enqueued = [c.split()[1] for c in calls if c.startswith("pack_uploaded")]
    assert [c for c in calls if c.startswith("finish")] == [f"finish ({enqueued[0]},)"]
    packer.allow()
    packer.freeze(encode({}))
    assert [c for c in calls if c.startswith("finish")][:2] == [f"finish ({n},)" for n in enqueued], "taken back now"
    assert packer.settle()
    calls.clear()
    assert packer.pack(on_host, lambda: None, lambda: calls.append("given")) is not None
    assert calls == ["given"]
    packer.hold_stream()
    assert calls == ["given"], "the host has read what there was to be read"


def test_whoever_cancels_at_the_last_moment_gets_what_was_read_discarded_or_the_stream_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The optimizer goes on at once: either nobody looks at the capture, or the device reads first."""
    packer, pool, calls, targets = watched(State("model:0"))
    enqueue, number = pool.pack_uploaded, 0

    def cancelled_in_the_last(*arguments: Any, **options: Any) -> int:
        nonlocal number
        number += 1
        ticket = enqueue(*arguments, **options)
        if number == last:
            packer.cancel()
            packer.hold_stream()
        return int(ticket)

    assert packer.pack(targets, lambda: None, lambda: None) is not None
    last = len([c for c in calls if c.startswith("pack_uploaded")])
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pool, "pack_uploaded", cancelled_in_the_last, raising=False)
        assert packer.pack(targets, lambda: None, lambda: calls.append("given")) is None
    assert number == last
    assert "given" not in calls
    packer.allow()

    def given() -> None:
        packer.cancel()
        packer.hold_stream()
        packer.allow()

    assert packer.pack(targets, lambda: None, given) is not None
    held = [c for c in calls if c.startswith("order_after")][-1]
    assert held == f"order_after (0, {max(int(c.split()[1]) for c in calls if c.startswith('pack_uploaded'))})"


class Slow(WatchedPool):
    """A pool whose work is not done for as long as a test says."""

    is_late = True

    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        return not self.is_late and self._pool.wait(ticket, timeout_s=timeout_s)


def test_a_freeze_that_is_late_drops_its_snapshot_and_not_the_next() -> None:
    state = State("model:0")
    pools: list[Slow] = []

    def watch(pool: _C.DevicePool) -> Slow:
        pools.append(Slow(pool, []))
        return pools[0]

    packer = packer_for(state.inventory, watch=watch, timeout_s=0.05)
    arena = arena_for(state.inventory)
    targets = targets_in(arena, state.inventory)
    packer.adopt(arena)
    packer.freeze(encode({"iteration": 1}))
    assert packer.pack(targets, lambda: None) is None
    assert (arena == 0xA5).all()
    pools[0].is_late = False
    packer.freeze(encode({"iteration": 2}))
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    for number, unit in enumerate(state.inventory.units):
        assert is_right(arena, targets, number, unit.nbytes, int(digests[number]))
    packer.close()


def test_calls_that_take_turns_leave_the_interpreter_to_others() -> None:
    """One thread enqueues, which lasts until another one writes a byte; a third waits for its turn meanwhile."""
    program = textwrap.dedent(
        """
        import sys, threading, time
        import numpy as np
        from megatron_moetion._C import DevicePool

        pool = DevicePool("model:0", rank=0, max_pieces=4, max_chunks=4, fault="gate")
        source, target = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
        pieces = np.array([(source.ctypes.data, target.ctypes.data, 64)], np.int64)
        chunks = np.array([(target.ctypes.data, 64, 0, 1)], np.int64)
        call = {
            "order": lambda: pool.order(0, 0),
            "order_after": lambda: pool.order_after(0, 7),
            "keep": lambda: pool.upload_pieces(np.zeros((0, 3), np.int64)),
            "finish": lambda: pool.finish(7, np.zeros(1, np.uint64)),
        }[sys.argv[1]]
        enqueuing = threading.Thread(target=lambda: pool.pack(pieces, chunks))
        enqueuing.start()
        time.sleep(0.1)  # it has its turn
        opening = threading.Timer(0.2, lambda: source.__setitem__(0, 1))
        opening.start()
        try:
            call()
        except ValueError:
            pass  # of a ticket that was never given, or one that is open
        enqueuing.join()
        opening.join()
        """
    )
    for call in ("order", "order_after", "keep", "finish"):
        subprocess.run([sys.executable, "-c", program, call], check=True, timeout=60)


def test_a_stream_can_wait_for_work_that_is_not_done_and_for_work_that_is() -> None:
    pool = Pool("model:0", rank=1, max_pieces=4, max_chunks=4, num_slots=2)
    pieces, chunks, _keep = one_chunk()
    ticket = pool.pack(pieces, chunks)
    pool.order_after(0, ticket)
    pool.finish(ticket)
    pool.order_after(0, ticket)


def test_training_does_not_wait_for_a_device_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    packer, pool, calls, targets = watched(State("model:0"))

    def fail(*arguments: Any) -> None:
        raise _C.DeviceError("not done after 60 s")

    for call in ("finish", "order_after"):
        monkeypatch.setattr(pool, call, fail, raising=False)
    with pytest.raises(DeviceFault, match="not done after"):
        packer.pack(targets[1:2], lambda: None, lambda: calls.append("given"))
    assert "given" in calls
    packer.hold_stream()


@pytest.mark.parametrize("device", ["model:0", "cpu"])
def test_gradients_are_kept_where_they_are_until_they_are_packed(device: str) -> None:
    """The next iteration's gradients are written over the live ones while a snapshot is packed."""
    rng = np.random.default_rng(6)
    gradients = [rng.integers(0, 256, 24_000, dtype=np.uint8), np.zeros(8_000, dtype=np.uint8)]
    weights = rng.integers(0, 256, 4_000, dtype=np.uint8)
    logs = [
        Unit(name=f"{n}.grad", kind=UnitKind.LOG, regions=(region(f"{n}.grad", "g", g, device, at_once=True),))
        for n, g in enumerate(gradients)
    ]
    weight = Unit(name="w", kind=UnitKind.DENSE, regions=(region("w", "w", weights, device),))
    inventory = Inventory(units=(weight, *logs))
    packer = packer_for(inventory)
    arena = arena_for(inventory)
    packer.adopt(arena)
    packer.freeze(b"")
    assert packer.zero_logs((1, 2)) == {2}
    expected = gradients[0].copy()
    gradients[0][:] = 0
    gradients[1][5] = 1
    assert packer.zero_logs((1, 2)) == {2}, "of the last freeze"
    targets = targets_in(arena, inventory)
    digests = packer.pack(targets[:2], lambda: None)
    assert digests is not None
    gradient = captured(arena, targets, 1, logs[0].nbytes)
    assert is_right(arena, targets, 1, logs[0].nbytes, int(digests[1]))
    assert (gradient[:24_000] == expected).all()
    packer.scatter(1, gradient)
    assert (gradients[0] == expected).all()
    packer.clear(2)
    assert not gradients[1].any()
    assert packer.note.endswith("; gradients wait in 0.0 MiB of its memory" if device == "model:0" else "")
    packer.close()
