# SPDX-License-Identifier: Apache-2.0
"""Each line of the GPU's benchmark runs, with the model of a device and small sizes in place of a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import device_pack
from megatron_moetion import _C
from megatron_moetion.snapshot import engines


class Stream:
    """A CUDA stream's number."""

    cuda_stream = 5


class Event:
    """Timed by the host, since all is done at once; seen as done when it is asked for the third time."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.questions = 0

    def record(self, stream: Stream | None = None) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        self.questions += 1
        return self.questions == 3

    def elapsed_time(self, end: Event) -> float:
        return (end.at_s - self.at_s) * 1e3


def on_host(make: Any) -> Any:
    """A function of torch that makes tensors, without what only a GPU has."""

    def made(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*arguments, **{**options, "device": "cpu"})

    return made


def model_pool(device: str, **options: Any) -> _C.DevicePool:
    assert device == device_pack.DEVICE
    return _C.DevicePool("model:0", **options)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("randint", "randn", "empty", "zeros"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    for name, found in {
        "Stream": Stream, "Event": Event, "synchronize": lambda: None, "is_available": lambda: True,
        "stream": lambda stream: contextlib.nullcontext(), "get_device_name": lambda number: "a model",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    kernels = SimpleNamespace(DevicePool=model_pool, built_with_cuda=lambda: True)
    monkeypatch.setattr(device_pack, "_C", kernels)
    monkeypatch.setattr(device_pack, "measure", partial(engines.measure, make_pool=model_pool))
    monkeypatch.setattr(device_pack, "SAMPLE_BYTES", 4 << 20)
    monkeypatch.setattr(device_pack, "SEGMENTS", {**device_pack.SEGMENTS, "64 MiB": 2 << 20})
    monkeypatch.setattr(device_pack, "EXPERTS", (2,))
    monkeypatch.setattr(device_pack, "REGION_BYTES", {"16 KiB": 16 << 10})
    monkeypatch.setattr(device_pack, "MATMUL_SIZE", 8)
    monkeypatch.setattr(device_pack, "QUICK", (4 << 20, 2, 2))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("parts", ["abcde", "e"])
def test_all_figures_of_the_chosen_parts_are_measured(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "device_pack.json"
    monkeypatch.setattr(sys, "argv", ["device_pack.py", "--quick", "--parts", parts, "--json", str(path)])
    device_pack.main()
    results = json.loads(path.read_text())["results"]
    assert {r["name"][:3] for r in results if r["name"].startswith("(")} == {f"({part})" for part in parts}
    assert all(r["value"] is not None for r in results)
