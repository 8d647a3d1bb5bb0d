# SPDX-License-Identifier: Apache-2.0
"""What the driver refuses, through the runtime that a GPU has: a dropped snapshot and a reason, never a crash."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import INVALID_DEVICE_FUNCTION, NOT_SUPPORTED, OUT_OF_MEMORY, Emulator, TorchCuda
from support import CHUNK_BYTES, acquire, capture, make_packer
from training import StateOnDevice, is_right

from megatron_moetion import _C
from megatron_moetion.errors import DeviceFault
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena


def train_and_capture(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, packer: Packer, arena: Arena, iteration: int = 1
) -> bool:
    """One iteration and its snapshot; whether all captures are right."""
    state.backward(torch_cuda.training, iteration)
    state.step(torch_cuda.training, iteration)
    records = capture(packer, arena, iteration)
    emulator.drain(torch_cuda.training)
    return all(is_right(state, arena, record) for record in records)


def train_until_it_fails(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, packer: Packer, arena: Arena
) -> None:
    """Three iterations, if no fault ends them."""
    for iteration in (1, 2, 3):
        train_and_capture(emulator, torch_cuda, state, packer, arena, iteration)


def test_memory_that_cannot_be_registered_is_reached_by_way_of_a_buffer(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    packer = make_packer(state.inventory, batch_bytes=2 * CHUNK_BYTES)
    emulator.fail_call("cudaHostRegister", NOT_SUPPORTED)
    packer.adopt(arena.memory)
    assert "could not be pinned" in packer.note
    assert "operation not supported" in packer.note
    assert not packer.is_direct
    assert train_and_capture(emulator, torch_cuda, state, packer, arena)
    packer.close()


def test_an_arena_that_is_registered_is_written_by_the_device(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    packer = make_packer(state.inventory, batch_bytes=2 * CHUNK_BYTES)
    packer.adopt(arena.memory)
    assert packer.is_direct
    assert train_and_capture(emulator, torch_cuda, state, packer, arena)
    packer.close()


def test_an_arena_that_is_registered_already_goes_by_way_of_a_buffer(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    other = _C.DevicePool("cuda:0", rank=0, max_pieces=1, max_chunks=1)
    registration = other.register(arena.memory.ctypes.data, arena.memory.nbytes)
    packer = make_packer(state.inventory)
    packer.adopt(arena.memory)
    assert "already mapped" in packer.note
    assert train_and_capture(emulator, torch_cuda, state, packer, arena)
    packer.close()
    registration.close()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostAlloc"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_too_little_memory_at_the_start_is_a_fault_with_a_name(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, call: str, nth: int
) -> None:
    emulator.fail_call(call, OUT_OF_MEMORY, nth)
    with pytest.raises(DeviceFault, match=rf"rank 3: .* on cuda:0 failed: {call} of \d+ bytes: out of memory"):
        make_packer(state.inventory, rank=3)


def test_too_little_memory_for_the_buffers_is_a_fault_with_a_name(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    packer = make_packer(state.inventory)
    emulator.fail_call("cudaHostRegister", NOT_SUPPORTED)
    emulator.fail_call("cudaHostAlloc", OUT_OF_MEMORY)
    with pytest.raises(DeviceFault, match="out of memory"):
        packer.adopt(arena.memory)


CALLS_OF_A_SNAPSHOT = (
    "cudaLaunchKernel",
    "cudaMemcpyAsync",
    "cudaEventRecord",
    "cudaEventQuery",
    "cudaStreamWaitEvent",
)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("call", CALLS_OF_A_SNAPSHOT)
def test_a_refused_call_ends_in_a_fault_that_is_repeated(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena, call: str, nth: int
) -> None:
    """Where the driver refuses one call, what was enqueued before it is not known any more."""
    packer = make_packer(state.inventory, batch_bytes=2 * CHUNK_BYTES)
    packer.adopt(arena.memory)
    emulator.fail_call(call, INVALID_DEVICE_FUNCTION, nth)
    with pytest.raises(DeviceFault, match=r"rank 0: .* on cuda:0 failed: .*invalid device function"):
        train_until_it_fails(emulator, torch_cuda, state, packer, arena)
    assert packer.fault is not None
    packer.hold_stream()  # the training thread, which does not know yet
    with pytest.raises(DeviceFault):
        packer.freeze(b"")
    torch.cuda.synchronize()  # what was enqueued before the refusal still writes into the arena
    packer.close()


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_kernel_that_fails_ends_in_a_fault_and_nothing_crashes_after_it(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena, nth: int
) -> None:
    """The error is sticky: every later call of this process returns it, those that free included."""
    packer = make_packer(state.inventory, batch_bytes=2 * CHUNK_BYTES)
    packer.adopt(arena.memory)
    emulator.fail_kernel(nth)
    with pytest.raises(DeviceFault, match="unspecified launch failure"):
        train_until_it_fails(emulator, torch_cuda, state, packer, arena)
    packer.hold_stream()
    packer.close()
    with pytest.raises(DeviceFault):
        packer.freeze(b"")
    with pytest.raises(DeviceFault, match="unspecified launch failure"):
        make_packer(state.inventory)
    del packer


def test_a_device_that_is_late_costs_snapshots_and_no_more(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena
) -> None:
    packer = make_packer(state.inventory, batch_bytes=2 * CHUNK_BYTES, timeout_s=0.1)
    packer.adopt(arena.memory)
    slots, targets = acquire(arena, range(len(state.inventory.units)))
    with emulator.stalled():
        for _ in range(2):
            packer.freeze(b"")
            assert packer.pack(targets, lambda: None) is None
    arena.release(slots)
    assert packer.fault is None
    emulator.drain(torch_cuda.training)
    # What was late is done by now, or while ``settle`` waits for it; then the next snapshot is as any other.
    packer.freeze(b"")
    packer.settle()
    assert train_and_capture(emulator, torch_cuda, state, packer, arena, 2)
    packer.close()


def test_a_pool_that_ends_while_the_device_hangs_frees_nothing(emulator: Emulator) -> None:
    """Freeing would wait for the device for ever."""
    pool = _C.DevicePool("cuda:0", rank=0, max_pieces=4, max_chunks=4, last_wait_s=0.05)
    source, target = emulator.array(1000), emulator.array(1000)
    pieces = np.array([(source.ctypes.data, target.ctypes.data, 1000)], dtype=np.int64)
    with emulator.stalled():
        pool.scatter(pieces, stream=emulator.stream())
        del pool  # the emulator complains of memory that is freed now
