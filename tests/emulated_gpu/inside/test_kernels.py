# SPDX-License-Identifier: Apache-2.0
"""nvcc's code of the kernels, instruction by instruction, in the cases of ``kernel_cases.py``."""

from __future__ import annotations

from collections.abc import Callable

import kernel_cases
import numpy as np
import pytest
from emulated import EmulatedBackend, EmulatedUploadedBackend, Emulator
from kernel_cases import DeviceBackend, make_case

from megatron_moetion import _C

NUM_SMS = 132
"""Of the emulated device."""

BACKENDS: dict[str, Callable[[Emulator], DeviceBackend]] = {
    "few-sms": lambda emulator: EmulatedBackend(emulator),
    "one-sm": lambda emulator: EmulatedBackend(emulator, num_sms=1),
    "all-sms": lambda emulator: EmulatedBackend(emulator, num_sms=10_000),
    "copy-engine": lambda emulator: EmulatedBackend(emulator, copy_engine_bytes=1),
    "uploaded": EmulatedUploadedBackend,
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", kernel_cases.ALL, ids=lambda case: case.__name__)
def test_case(emulator: Emulator, case: Callable[[DeviceBackend], None], name: str) -> None:
    case(BACKENDS[name](emulator))


@pytest.mark.parametrize("variant", ["compute_80", "compute_100"])
@pytest.mark.parametrize("case", kernel_cases.ALL, ids=lambda case: case.__name__)
def test_case_on_other_architectures(emulator: Emulator, case: Callable[[DeviceBackend], None], variant: str) -> None:
    if not emulator.choose_kernels(variant):
        pytest.skip(f"this nvcc does not know {variant}")
    case(EmulatedBackend(emulator))


def test_nothing_to_do(emulator: Emulator) -> None:
    backend = EmulatedBackend(emulator)
    assert backend.pack(np.zeros((0, 3), np.int64), np.zeros((0, 4), np.int64)).size == 0
    backend.scatter(np.zeros((0, 3), np.int64))


@pytest.mark.parametrize("num_sms", [1, 4, 7, 10_000])
def test_a_launch_stays_on_as_many_multiprocessors_as_it_may_take(emulator: Emulator, num_sms: int) -> None:
    """The hardware gives each block an SM of its own as long as there are any."""
    pool = _C.DevicePool("cuda:0", rank=0, max_pieces=8, max_chunks=8, num_sms=num_sms, census=True)
    backend = EmulatedBackend(emulator)
    case = make_case(backend, [[(0, 3_000_001)]], np.random.default_rng(3))
    ticket = pool.pack(case.pieces, case.chunks, stream=backend.stream)
    assert pool.wait(ticket, timeout_s=60)
    found = pool.multiprocessors(ticket)
    pool.finish(ticket)
    assert len(found) == min(num_sms, NUM_SMS) == pool.num_sms
    assert found == sorted(set(found))


def test_work_is_timed_by_the_device(emulator: Emulator) -> None:
    pool = _C.DevicePool("cuda:0", rank=0, max_pieces=8, max_chunks=8, timed=True)
    backend = EmulatedBackend(emulator)
    case = make_case(backend, [[(0, 100_000)]], np.random.default_rng(4))
    for engine in (None, 1):
        ticket = pool.pack(case.pieces, case.chunks, stream=backend.stream, copy_engine_bytes=engine)
        assert pool.wait(ticket, timeout_s=60)
        assert 0 < pool.device_seconds(ticket) < 60
        pool.finish(ticket)


def test_the_pool_names_its_device(emulator: Emulator) -> None:
    pool = _C.DevicePool("cuda:1", rank=0, max_pieces=1, max_chunks=1)
    assert pool.pci_bus_id == "0000:c1:00.0"
    assert pool.copy_engine in ("cudaMemcpyBatchAsync", "cudaMemcpyAsync")
    with pytest.raises(_C.DeviceError, match="cuda:7 is not there"):
        _C.DevicePool("cuda:7", rank=0, max_pieces=1, max_chunks=1)
