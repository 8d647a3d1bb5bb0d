# SPDX-License-Identifier: Apache-2.0
"""Every kernel, on every instruction set at hand and on the model of a device, against the reference, bit for bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import kernel_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import POISON, SIZES, Backend, Case, DeviceBackend, HostBackend, UploadedBackend, check, make_case

from megatron_moetion import _C

ISAS = _C.available_isas()
BACKENDS = {f"host-{isa}": lambda isa=isa: HostBackend(2, isa) for isa in ISAS} | {
    "model": lambda: DeviceBackend(),
    "model-copy-engine": lambda: DeviceBackend(copy_engine_bytes=1),
    "model-uploaded": lambda: UploadedBackend(copy_engine_bytes=3000),
    "model-lazy": lambda: DeviceBackend(copy_engine_bytes=3000, seed=1),
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="module", params=ISAS)
def pool(request: pytest.FixtureRequest) -> _C.HostPool:
    return _C.HostPool(2, request.param)


@pytest.mark.parametrize("case", kernel_cases.ALL, ids=lambda case: case.__name__)
def test_case(backend: Backend, case: Callable[[Backend], None]) -> None:
    case(backend)


@pytest.mark.parametrize("case", kernel_cases.ON_HOST, ids=lambda case: case.__name__)
def test_case_on_the_host(pool: _C.HostPool, case: Callable[[HostBackend], None]) -> None:
    case(HostBackend(2, pool.isa))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"host-{ISAS[-1]}", "model", "model-copy-engine"])
def test_one_gibibyte(name: str) -> None:
    kernel_cases.one_gibibyte(BACKENDS[name]())


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    backend, rng = HostBackend(threads), np.random.default_rng(4)
    check(make_case(backend, [[(0, 64 * int(n))] for n in rng.integers(0, 9000, 24)], rng), backend)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_generated_layouts(backend: Backend, data: st.DataObject) -> None:
    pair = st.tuples(st.sampled_from((0, 0, 0, 1, 8, 63, 64, 200)), st.sampled_from(SIZES) | st.integers(0, 700))
    layout = data.draw(st.lists(st.lists(pair, max_size=6), max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    check(make_case(backend, layout, rng, data.draw(st.sampled_from((0, 0, 1, 8, 16, 63)))), backend)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_copy_moves_the_same_bytes(pool: _C.HostPool, streaming: bool) -> None:
    backend = HostBackend(2, pool.isa)
    case = make_case(backend, [[(0, size)] for size in (*SIZES, 600_003)], np.random.default_rng(7), misalignment=1)
    want, _ = case.run(backend)
    case.dst.write(np.full(case.dst_bytes, POISON, dtype=np.uint8))
    pool.copy(case.pieces, case.chunks, streaming=streaming)
    np.testing.assert_array_equal(case.dst.read(), want)


def test_nothing_to_do(backend: Backend) -> None:
    assert backend.pack(np.zeros((0, 3), np.int64), np.zeros((0, 4), np.int64)).size == 0
    backend.scatter(np.zeros((0, 3), np.int64))


def test_cancel_stops_a_pack_and_can_be_cleared(pool: _C.HostPool) -> None:
    case = make_case(HostBackend(), [[(0, 500_000)]] * 4, np.random.default_rng(9))
    cancel, digests = _C.Cancel(), np.zeros(4, dtype=np.uint64)
    cancel.set()
    assert cancel.is_set()
    assert not pool.pack(case.pieces, case.chunks, digests, cancel)
    assert (case.dst.read() == POISON).all()
    cancel.clear()
    assert not cancel.is_set()
    assert pool.pack(case.pieces, case.chunks, digests, cancel)


def test_concurrent_callers_take_turns(pool: _C.HostPool) -> None:
    shared = HostBackend(2, pool.isa)
    cases = [make_case(shared, [[(0, 90_000 + n)]] * 6, np.random.default_rng(n)) for n in range(4)]
    failures: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(10):
                check(case, shared)
        except BaseException as failure:  # carried to the main thread, whatever it is
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("pieces", "chunks", "names"),
    [
        ([(0, 64, 8)], [(64, 64, 0, 1)], r"piece 0: src=0, nbytes=8"),
        ([(8, 64, -1)], [(64, 64, 0, 1)], r"piece 0: src=0x8, nbytes=-1"),
        ([(8, 60, 8)], [(64, 64, 0, 1)], r"piece 0: dst=0x3c, nbytes=8.* 0x40 .*chunk 0"),
        ([(8, 121, 8)], [(64, 64, 0, 1)], r"piece 0: dst=0x79.* 0x80, the end of chunk 0"),
        ([(8, 64, 8), (8, 71, 8)], [(64, 64, 0, 2)], r"piece 1: dst=0x47.* 0x48 \(the end of the piece before\)"),
        ([(8, 64, 2**63 - 2)], [(64, 64, 0, 1)], r"piece 0: src=0x8, nbytes=9223372036854775806"),
        ([], [(64, 64, 0, 1)], r"chunk 0: first_piece=0, num_pieces=1; there are 0 pieces"),
        ([], [(64, 64, 2**63 - 1, 1)], r"chunk 0: first_piece=9223372036854775807"),
        ([], [(0, 64, 0, 0)], r"chunk 0: dst=0, nbytes=64"),
        ([], [(164, 64, 0, 0), (64, 101, 0, 0)], r"chunks 1 and 0 overlap: dst=0x40 \+ nbytes=101 .* dst=0xa4"),
    ],
)
def test_a_bad_table_is_refused_with_row_and_values(
    pieces: list[tuple[int, ...]], chunks: list[tuple[int, ...]], names: str
) -> None:
    for backend in (HostBackend(), DeviceBackend()):
        with pytest.raises(ValueError, match=names):
            backend.pack(np.array(pieces, np.int64).reshape(-1, 3), np.array(chunks, np.int64))


def test_bad_arrays_are_refused() -> None:
    pool, pieces = _C.HostPool(1), np.zeros((0, 3), np.int64)
    chunks = np.zeros((2, 4), np.int64)
    with pytest.raises(ValueError, match=r"digests holds 1 values .* array of 2"):
        pool.pack(pieces, chunks, np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match=r"chunks .* shape \[n, 4\]"):
        pool.pack(pieces, np.zeros((2, 3), np.int64), np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="pieces 1 and 0 overlap"):
        pool.scatter(np.array([(64, 132, 8), (64, 128, 8)], np.int64))
    with pytest.raises(TypeError):  # a strided view would have to be copied
        pool.digest(chunks[:, :2], np.zeros(2, np.uint64))
    with pytest.raises(TypeError):
        pool.pack(pieces.astype(np.int32), chunks, np.zeros(2, np.uint64))
    read_only = np.zeros(2, np.uint64)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        pool.pack(pieces, chunks, read_only)


def test_pools_say_what_they_are() -> None:
    assert _C.HostPool(3).isa == ISAS[-1]
    with pytest.raises(ValueError, match="num_threads is 0"):
        _C.HostPool(0)
    with pytest.raises(ValueError, match="isa is 'sse9'; this machine and build offer auto, scalar"):
        _C.HostPool(1, "sse9")


def test_a_forked_child_is_told_and_ends() -> None:
    pool = _C.HostPool(4)
    child = os.fork()
    if child == 0:
        try:
            pool.scatter(np.zeros((0, 3), np.int64))
        except RuntimeError as refusal:
            del pool  # must not wait for threads that the child does not have
            os._exit(0 if "fork" in str(refusal) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
