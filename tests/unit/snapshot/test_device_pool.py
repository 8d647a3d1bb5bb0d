# SPDX-License-Identifier: Apache-2.0
"""The pool of a device by itself: its tickets, the order of its work between streams, and each fault of a driver.

``model:0`` stands for the device. With a seed it is lazy: work runs when somebody asks, in an order of the seed's.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_moetion import _C
from megatron_moetion.snapshot import reference

TRAINING, SIDE = 0, 7
"""Streams: training's, and the one that snapshots are packed on."""
SEEDS = range(1, 21)
LARGE, SMALL = 3000, 500
"""Bytes of the chunk that the copy engine moves, and of the one that the kernel moves, from two pieces."""
NEVER = "late:1000000000"


class Work:
    """State of training in two chunks, and where they are packed to."""

    def __init__(self) -> None:
        self.source = np.zeros(LARGE + SMALL + 1, np.uint8)
        self.target = np.zeros(LARGE + SMALL, np.uint8)
        src, dst = self.source.ctypes.data, self.target.ctypes.data
        self.pieces = np.array(
            [(src, dst, LARGE), (src + LARGE, dst + LARGE, 200), (src + LARGE + 201, dst + LARGE + 200, 300)], np.int64
        )
        self.chunks = np.array([(dst, LARGE, 0, 1), (dst + LARGE, SMALL, 1, 2)], np.int64)
        self.digests = np.zeros(2, np.uint64)

    @property
    def uploaded_chunks(self) -> np.ndarray:
        """Rows for ``pack_uploaded`` of the same pieces."""
        return np.ascontiguousarray(np.hstack([self.chunks, self.chunks[:, :1]]))

    def holds(self, value: int) -> bool:
        """Whether all that was packed is this value, by bytes and by digests."""
        chunks = (self.target[:LARGE], self.target[LARGE:])
        wanted = [reference.digest_chunk(np.full(c.size, value, np.uint8)) for c in chunks]
        return bool((self.target == value).all()) and self.digests.tolist() == wanted


def make_pool(fault: str = "", seed: int = 0, last_wait_s: float = 10) -> _C.DevicePool:
    return _C.DevicePool(
        "model:0", rank=7, max_pieces=8, max_chunks=8, num_slots=2, num_sms=3, timed=True, census=True,
        last_wait_s=last_wait_s, fault=fault, seed=seed,
    )  # fmt: skip


# -- a ticket ------------------------------------------------------------------------------------------------


def test_a_ticket_tells_its_time_and_its_multiprocessors_between_wait_and_finish() -> None:
    work, pool = Work(), make_pool(seed=1)
    ticket = pool.pack(work.pieces, work.chunks, copy_engine_bytes=LARGE)
    assert pool.wait(ticket, timeout_s=60)
    assert 0 < pool.device_seconds(ticket) < 60
    assert pool.multiprocessors(ticket) == [0, 1], "one tile of each chunk, one block on each of two multiprocessors"
    pool.finish(ticket)
    for ask in (pool.device_seconds, pool.multiprocessors):
        with pytest.raises(ValueError, match=f"ticket {ticket} is not one of this pool's"):
            ask(ticket)


def test_a_kernel_stays_on_the_multiprocessors_that_it_was_allowed() -> None:
    pool = _C.DevicePool("model:0", rank=0, max_pieces=1, max_chunks=1, num_sms=2, census=True)
    source, target = np.zeros(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    ticket = pool.scatter(np.array([(source.ctypes.data, target.ctypes.data, 1 << 20)], np.int64))
    assert pool.multiprocessors(ticket) == [0, 1]
    assert pool.num_sms == 2
    assert pool.pci_bus_id == ""


def test_what_a_pool_was_not_made_for_or_is_not_done_is_not_told() -> None:
    work, plain = Work(), _C.DevicePool("model:0", rank=0, max_pieces=8, max_chunks=8)
    ticket = plain.pack(work.pieces, work.chunks)
    with pytest.raises(ValueError, match="was not made with timed"):
        plain.device_seconds(ticket)
    with pytest.raises(ValueError, match="was not made with census"):
        plain.multiprocessors(ticket)
    late = make_pool("late")
    ticket = late.pack(work.pieces, work.chunks)
    for ask in (late.device_seconds, late.multiprocessors):
        with pytest.raises(ValueError, match=f"ticket {ticket} is not done; wait for it first"):
            ask(ticket)
    late.finish(ticket)


# -- the order of work ---------------------------------------------------------------------------------------


def is_right(seed: int, fault: str = "") -> bool:
    """Whether a snapshot between two steps of a training that enqueues ahead holds what the first step wrote."""
    work, pool = Work(), make_pool(fault, seed)
    address, nbytes = work.source.ctypes.data, work.source.nbytes
    pool.model_fill(TRAINING, address, 1, nbytes)
    pool.order(SIDE, TRAINING)
    ticket = pool.pack(work.pieces, work.chunks, stream=SIDE, copy_engine_bytes=LARGE)
    pool.order_after(TRAINING, ticket)
    pool.model_fill(TRAINING, address, 2, nbytes)
    pool.finish(ticket, work.digests)
    found = work.holds(1)
    for stream in (SIDE, TRAINING):
        pool.model_sync(stream)
    assert (work.source == 2).all()
    return found


def test_work_of_several_streams_is_in_order_whatever_the_device_does_first() -> None:
    assert all(is_right(seed) for seed in SEEDS)


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["order", "fork", "join", "order_after"])
def test_each_wait_between_streams_is_needed(number: int) -> None:
    assert not all(is_right(seed, f"no-wait:{number}") for seed in SEEDS)


def test_there_are_no_other_waits_than_those_four() -> None:
    assert all(is_right(seed, "no-wait:5") for seed in SEEDS)


def test_no_wait_is_made_where_one_engine_does_all() -> None:
    for engine in (None, 1):
        work, pool = Work(), make_pool("wait")
        pool.finish(pool.scatter(work.pieces, copy_engine_bytes=engine))
        assert not work.target.any()


def test_training_of_the_model_does_nothing_before_it_is_asked_for() -> None:
    pool = make_pool(seed=3)
    memory = np.zeros(16, np.uint8)
    pool.model_fill(TRAINING, memory.ctypes.data, 9, 8)
    pool.model_copy(TRAINING, memory.ctypes.data, memory.ctypes.data + 8, 8)
    assert not memory.any()
    pool.model_sync(SIDE)
    assert not memory.any()
    pool.model_sync(TRAINING)
    assert (memory == 9).all()


# -- late is not failed --------------------------------------------------------------------------------------


def test_pieces_whose_upload_is_late_can_be_uploaded_again() -> None:
    work, pool = Work(), make_pool("late:60")
    with pytest.raises(_C.DeviceLate, match=r"rank 7: upload of 3 pieces on model is not done after 0 s"):
        pool.upload_pieces(work.pieces, timeout_s=0)
    with pytest.raises(ValueError, match="there are 0 pieces"):
        pool.pack_uploaded(work.uploaded_chunks)
    pool.upload_pieces(work.pieces)
    ticket = pool.pack_uploaded(work.uploaded_chunks)
    pool.finish(ticket, work.digests)
    assert work.holds(0)


@pytest.mark.parametrize("what", ["pack", "upload"])
def test_a_pool_that_ends_while_the_device_may_still_write_frees_nothing_that_it_writes(what: str) -> None:
    """The model ends the process if memory of work that is still to be done is given back."""
    program = textwrap.dedent(
        f"""
        import numpy as np
        from megatron_moetion._C import DeviceLate, DevicePool

        pool = DevicePool("model:0", rank=0, max_pieces=4, max_chunks=4, last_wait_s=0, fault="{NEVER}")
        memory = np.zeros(128, np.uint8)
        pieces = np.array([(memory.ctypes.data, memory.ctypes.data + 64, 64)], np.int64)
        if "{what}" == "pack":
            pool.scatter(pieces)
        else:
            try:
                pool.upload_pieces(pieces, timeout_s=0)
            except DeviceLate:
                pass
        del pool
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# -- what a driver refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_pool_for_which_there_is_no_memory_says_so(number: int) -> None:
    with pytest.raises(_C.DeviceError, match=r"^rank 7: pool of 2 slots on model failed: allocation .* out of memory"):
        make_pool(f"memory:{number}")


@pytest.mark.parametrize("number", [5, 6])
def test_an_upload_without_memory_breaks_nothing(number: int) -> None:
    work, pool = Work(), make_pool(f"memory:{number}")
    for _ in range(2):
        with pytest.raises(_C.DeviceError, match=r"^rank 7: upload of 3 pieces on model failed: .*out of memory"):
            pool.upload_pieces(work.pieces)
    pool.finish(pool.pack(work.pieces, work.chunks), work.digests)
    assert work.holds(0)


def test_pinned_memory_and_registration_that_are_refused_break_nothing() -> None:
    work, pool = Work(), make_pool("memory:5")
    with pytest.raises(_C.DeviceError, match=r"^rank 7: pinning of 4096 new bytes on model failed: .*out of memory"):
        pool.pinned(4096)
    pool.finish(pool.pack(work.pieces, work.chunks))
    pool = make_pool("register")
    with pytest.raises(_C.DeviceError, match=r"^rank 7: registration of 3501 bytes on model failed: cudaHostRegister"):
        pool.register(work.source.ctypes.data, work.source.nbytes)
    pool.finish(pool.pack(work.pieces, work.chunks))


@pytest.mark.parametrize("fault", ["launch", "copy:1", "copy:2", "copy:3", "wait:1", "wait:2"])
def test_work_that_fails_is_named_and_the_pool_is_not_used_again(fault: str) -> None:
    """Of copies: the table, the large run, the digests; of waits: the fork, the join."""
    work, pool = Work(), make_pool(fault, seed=1)
    failed = rf"^rank 7: pack of 3 pieces from \[{work.source.ctypes.data:#x}, .*\) to \[.* on model failed: .*injected"
    with pytest.raises(_C.DeviceError, match=failed) as raised:
        pool.pack(work.pieces, work.chunks, copy_engine_bytes=LARGE)
    assert not isinstance(raised.value, _C.DeviceLate)
    for later in (lambda: pool.scatter(work.pieces), lambda: pool.order(SIDE, TRAINING)):
        with pytest.raises(_C.DeviceError, match=failed):
            later()


def life_of_a_pool(fault: str) -> Iterator[str]:
    """All that is done with a pool, one step after the other."""
    work = Work()
    pool = make_pool(fault, last_wait_s=0)
    yield "made"
    pool.check_spans_are_here(np.array([(work.source.ctypes.data, 8)], np.int64))
    yield "looked up"
    registration = pool.register(work.target.ctypes.data, work.target.nbytes)
    yield "registered"
    pool.pinned(64)
    yield "pinned"
    pool.upload_pieces(work.pieces)
    yield "uploaded"
    pool.order(SIDE, TRAINING)
    yield "ordered"
    ticket = pool.pack_uploaded(work.uploaded_chunks, stream=SIDE, copy_engine_bytes=LARGE)
    yield "packed"
    pool.order_after(TRAINING, ticket)
    yield "held"
    assert pool.wait(ticket, timeout_s=60)
    yield "waited"
    pool.device_seconds(ticket)
    yield "timed"
    pool.multiprocessors(ticket)
    yield "counted"
    pool.finish(ticket, work.digests)
    yield "finished"
    assert work.holds(0)
    registration.close()


def steps_and_error(fault: str) -> tuple[list[str], str]:
    """How far a pool comes, and the error that ended it; an empty text if none did."""
    steps = []
    try:
        for step in life_of_a_pool(fault):
            steps.append(step)
    except _C.DeviceError as error:
        return steps, str(error)
    return steps, ""


def test_an_error_that_sticks_is_named_wherever_it_comes_first() -> None:
    whole, error = steps_and_error("")
    assert error == ""
    number, failed_after = 1, set[int]()
    while True:
        steps, error = steps_and_error(f"sticky:{number}")
        if not error:
            break
        assert error.startswith("rank 7: ")
        assert "on model failed: " in error
        assert "an illegal memory access was encountered" in error
        failed_after.add(len(steps))
        number += 1
    assert steps == whole
    assert failed_after == set(range(len(whole))), "each step met it"


@pytest.mark.parametrize("fault", ["nothing", "late:0", "late:x", "copy:", ":3"])
def test_a_fault_has_a_name_and_a_number(fault: str) -> None:
    with pytest.raises(ValueError, match=f"fault is '{fault}'"):
        make_pool(fault)
    with pytest.raises(ValueError, match="gate needs seed 0"):
        make_pool("gate", seed=1)
