# SPDX-License-Identifier: Apache-2.0
"""No test leaves a network behind: its threads never rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from ends import AT_END


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    before = _network_threads()
    yield
    AT_END.close()
    for thread in _network_threads() - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), f"{thread.name} goes on after the test"


def _network_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(("moetion-control", "moetion-listen"))}
