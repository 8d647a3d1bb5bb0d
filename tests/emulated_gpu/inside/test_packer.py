# SPDX-License-Identifier: Apache-2.0
"""The packer's other uses of a device: state that comes back, and gradients that are all zeros."""

from __future__ import annotations

import pytest
from emulated import NOT_SUPPORTED, Emulator, TorchCuda
from support import capture, make_packer
from training import StateOnDevice

from megatron_moetion.store.arena import Arena
from megatron_moetion.units import UnitKind


@pytest.mark.parametrize("is_direct", [True, False], ids=["pinned-arena", "by-way-of-a-buffer"])
def test_captures_are_written_back(
    emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice, arena: Arena, is_direct: bool
) -> None:
    packer = make_packer(state.inventory)
    if not is_direct:
        emulator.fail_call("cudaHostRegister", NOT_SUPPORTED)
    packer.adopt(arena.memory)
    assert packer.is_direct == is_direct
    state.step(torch_cuda.training, 1)
    records = capture(packer, arena, 1)
    state.step(torch_cuda.training, 2)
    for record in records:
        packer.scatter(record.unit, arena.payload(record.slot))
    assert all((array == 1).all() for arrays in state.weights for array in arrays)
    packer.close()


def test_gradients_of_zeros_are_found(emulator: Emulator, torch_cuda: TorchCuda, state: StateOnDevice) -> None:
    packer = make_packer(state.inventory)
    state.backward(torch_cuda.training, 1)
    for gradient in state.gradients[1:]:
        emulator.fill(torch_cuda.training, gradient, 0)
    emulator.fill(torch_cuda.training, state.gradients[2][-1:], 1)
    packer.freeze(b"")
    state.backward(torch_cuda.training, 2)
    _, zeros, _, zeros_too = logs = state.inventory.of_kind(UnitKind.LOG)
    assert packer.zero_logs(logs) == {zeros, zeros_too}
    packer.close()
