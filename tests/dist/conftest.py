# SPDX-License-Identifier: Apache-2.0
"""Jobs of several real processes on this machine, with stores of their own in shared memory."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("jobs")

from jobs import Job, Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    found = Nursery("toy")
    yield found
    found.close()


@pytest.fixture
def store() -> Iterator[Path]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="moetion-dist-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def job(nursery: Nursery, store: Path, tmp_path: Path) -> Callable[..., Job]:
    """Makes jobs; each has a folder for notes and a store of its own."""
    made: list[Job] = []

    def make(**settings: Any) -> Job:
        name = f"job{len(made)}"
        made.append(Job(nursery, tmp_path / name, settings.pop("store", store / name), **settings))
        return made[-1]

    return make
