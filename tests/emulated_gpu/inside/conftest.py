# SPDX-License-Identifier: Apache-2.0
"""These tests run in a process of their own, where ``megatron_moetion._C`` is the build for the emulated GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from emulated import Emulator, TorchCuda
from training import StateOnDevice, arena_of

from megatron_moetion.store.arena import Arena


@pytest.fixture(scope="session")
def machine() -> Emulator:
    return Emulator()


@pytest.fixture
def emulator(machine: Emulator) -> Iterator[Emulator]:
    """The machine, with nothing under way. A test after which it has something to complain of fails."""
    gc.collect()  # pools of tests before, whose ends would count as this test's
    machine.reset()
    yield machine
    assert machine.violations() == []


@pytest.fixture
def torch_cuda(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> TorchCuda:
    return TorchCuda(emulator, monkeypatch)


@pytest.fixture
def state(emulator: Emulator) -> StateOnDevice:
    return StateOnDevice(emulator)


@pytest.fixture
def arena(state: StateOnDevice, tmp_path: Path) -> Arena:
    return arena_of(state, tmp_path)
