# SPDX-License-Identifier: Apache-2.0
"""A made-up machine for the tests of ``gpu_check``: its GPUs, its tools, its torch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpu_check.machine import Machine
from gpu_check.part import Setting

GPU = "NVIDIA H200"


def machine(gpus: int = 0) -> Machine:
    return Machine(gpus=(GPU,) * gpus, driver="580.1", torch="2.11.0+cu130", cuda="13.0")


def setting(folder: Path, *, gpus: int = 0, quick: bool = False, left_s: float = 600.0) -> Setting:
    """Where a part runs; its arenas go to the same folder."""
    return Setting(
        results=folder, machine=machine(gpus), store=folder, quick=quick, deadline_s=time.monotonic() + left_s
    )


def fake_torch(gpus: int) -> Any:
    """In place of torch, as far as ``gpu_check`` itself asks it."""
    cuda = SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus, get_device_name=lambda index: GPU)
    return SimpleNamespace(__version__="2.11.0+cu130", version=SimpleNamespace(cuda="13.0"), cuda=cuda)


def tool(path: Path, script: str) -> None:
    """A command; it finds this interpreter as ``$PYTHON``."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nPYTHON={sys.executable}\n{script}\n")
    path.chmod(0o755)


def parts_of(results: Path) -> dict[str, Any]:
    """What ``summary.json`` says of each part."""
    parts: dict[str, Any] = json.loads((results / "summary.json").read_text())["parts"]
    return parts


def figure(name: str, value: float | None, met: bool | None = None) -> dict[str, Any]:
    """A figure as the benchmarks write it."""
    return {"name": name, "value": value, "unit": "s", "target": None if met is None else "<= 1", "met": met}
