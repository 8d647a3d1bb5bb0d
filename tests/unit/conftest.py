# SPDX-License-Identifier: Apache-2.0
"""No test leaves a network behind: its threads never rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from ends import AT_END


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    AT_END.close()
    left = [t.name for t in threading.enumerate() if t not in before]
    assert not [name for name in left if name.startswith(("moetion-control", "moetion-listen"))]
