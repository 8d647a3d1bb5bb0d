# SPDX-License-Identifier: Apache-2.0
"""Tests of the real Transformer Engine, on the CPU: its modules and optimizers are made, its kernels do not run.

``scripts/test_te.sh PYTHON`` runs them, in a process in which torch's CUDA names are redirected. Anywhere else each
file of this folder is skipped, unread, and the reason says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

# isort: split
from engine import pretend

HOW = "scripts/test_te.sh PYTHON runs these tests"
IS_THEIR_PROCESS = os.environ.get("MOETION_REQUIRE_TE") == "1"


def what_is_missing() -> str:
    """Why these tests cannot run in this process; empty if they can, and then torch is redirected."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed for {sys.executable} (requirements/te.txt); {HOW}"
    if not IS_THEIR_PROCESS:
        return f"they redirect torch's CUDA names, and so need a process of their own; {HOW}"
    if torch.cuda.is_available():
        return "torch can use a GPU, which is never redirected: set CUDA_VISIBLE_DEVICES=''"
    try:
        pretend()
    except (ImportError, OSError) as error:
        return f"Transformer Engine cannot be imported: {error}; {HOW}, and sets LD_LIBRARY_PATH"
    return ""


MISSING = what_is_missing()


class Unread(pytest.Module):
    """A file of tests that is not imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        if IS_THEIR_PROCESS:
            raise pytest.UsageError(f"MOETION_REQUIRE_TE=1, but {MISSING}")
        pytest.skip(MISSING, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Unread.from_parent(parent, path=module_path) if MISSING else None
