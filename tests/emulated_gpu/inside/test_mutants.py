# SPDX-License-Identifier: Apache-2.0
"""Kernels with a fault put into them: what shows that the emulator, or a case, would see it."""

from __future__ import annotations

import kernel_cases
import pytest
from emulated import EmulatedBackend, Emulator

from megatron_moetion import _C

SEEN_BY_THE_EMULATOR = {
    "reads_vectors_unaligned": r"a misaligned read of 16 bytes",
    "reads_past_a_piece": r"outside the job: a read of 1 bytes",
    "writes_past_a_chunk": r"outside the job: a write of 1 bytes",
    "a_lane_leaves_before_the_shuffle": r"the lanes of a warp do not meet at a shuffle",
}


@pytest.mark.parametrize("mutant", SEEN_BY_THE_EMULATOR)
def test_a_fault_that_the_emulator_sees(machine: Emulator, mutant: str) -> None:
    machine.reset()
    assert machine.choose_kernels(mutant)
    with pytest.raises(_C.DeviceError, match="illegal memory access"):
        kernel_cases.every_size_and_alignment(EmulatedBackend(machine))
    (violation,) = machine.violations()
    assert SEEN_BY_THE_EMULATOR[mutant] in violation


def test_a_fault_that_the_digests_show(emulator: Emulator) -> None:
    assert emulator.choose_kernels("leaves_a_step_of_the_shuffle_out")
    with pytest.raises(AssertionError, match="not equal"):
        kernel_cases.every_size_and_alignment(EmulatedBackend(emulator))


def test_memory_that_is_not_the_devices_is_refused(machine: Emulator) -> None:
    machine.reset()
    backend = EmulatedBackend(machine)
    backend.source = kernel_cases.HostMemory  # type: ignore[method-assign]  # neither the device's nor pinned
    with pytest.raises(_C.DeviceError, match="illegal memory access"):
        kernel_cases.each_source_alignment(backend)
    assert "is not memory that the device sees" in machine.violations()[0]
