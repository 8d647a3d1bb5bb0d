# SPDX-License-Identifier: Apache-2.0
"""State that needs a bounce buffer is captured and written back like state that does not.

``meta`` stands for a device whose memory happens to be this process's.
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.snapshot.host_state import encode
from megatron_moetion.snapshot.packer import BATCH_BYTES, Packer
from megatron_moetion.snapshot.plan import Target
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

CHUNK_BYTES = 4096


def region(unit: str, name: str, data: np.ndarray, device: str, at_once: bool = False) -> Region:
    return Region(
        unit=unit,
        tensor=name,
        role=Role.MASTER,
        dtype="uint8",
        start=0,
        nbytes=data.nbytes,
        address=data.ctypes.data,
        device=device,
        at_once=at_once,
    )


def inventory(device: str, big: np.ndarray, small: np.ndarray, counter: np.ndarray) -> Inventory:
    return Inventory(
        units=(
            Unit(name="big", kind=UnitKind.DENSE, regions=(region("big", "w", big, device),)),
            Unit(
                name="small",
                kind=UnitKind.DENSE,
                regions=(region("small", "w", small, device), region("small", "n", counter, device, at_once=True)),
            ),
            Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=256),
        )
    )


def test_same_capture_as_from_host_memory_and_back() -> None:
    rng = np.random.default_rng(5)
    big = rng.integers(0, 256, BATCH_BYTES + 12_345, dtype=np.uint8)  # larger than the buffer would be by default
    small = rng.integers(0, 256, 9_001, dtype=np.uint8)
    counter = np.array([3, 1, 4], dtype=np.int64)
    captures = {}
    for device in ("cpu", "meta"):
        counter[:] = (3, 1, 4)
        units = inventory(device, big, small, counter)
        packer = Packer(units, CHUNK_BYTES, 1)
        packer.freeze(encode({"iteration": 7}))
        counter[:] = -1  # moves on before the copy
        memory = [np.full(u.nbytes, 0xA5, dtype=np.uint8) for u in units.units]
        targets = [
            Target(unit=i, address=m.ctypes.data, digests=np.zeros(-(-m.nbytes // CHUNK_BYTES), dtype=np.uint64))
            for i, m in enumerate(memory)
        ]
        digests = packer.pack(targets, lambda: None)
        assert digests is not None
        captures[device] = ([m.tobytes() for m in memory], digests)
        expected = (big.copy(), small.copy())
        big[:], small[:] = 0, 0
        for number, capture in enumerate(memory[:2]):
            packer.scatter(number, capture)
        assert (big == expected[0]).all()
        assert (small == expected[1]).all()
        assert counter.tolist() == [3, 1, 4]
    assert captures["cpu"] == captures["meta"]


def test_two_devices_are_refused() -> None:
    data = np.zeros(64, dtype=np.uint8)
    units = tuple(
        Unit(name=name, kind=UnitKind.DENSE, regions=(region(name, "w", data, device),))
        for name, device in (("a", "cuda:0"), ("b", "cuda:1"))
    )
    with pytest.raises(UnsupportedState, match="several devices: cuda:0, cuda:1"):
        Packer(Inventory(units=units), CHUNK_BYTES, 1)
