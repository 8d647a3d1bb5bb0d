# SPDX-License-Identifier: Apache-2.0
"""Which request of a pipeline call tells that the network has what it sends. Real ones: ``dist/test_traffic.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moetion.mcore.traffic import SendRequests

NAMES = ("send_prev", "recv_prev", "send_next", "recv_next")


class Work:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait(self) -> bool:
        self._log.append(self.name)
        return True


def call(asked: tuple[str, ...], *, kind: str = "list", is_cuda: bool = False, watch: bool = True) -> list[str]:
    """What happens, in order, when a call posts these requests and waits for all of them."""
    log: list[str] = []
    tensors = {f"tensor_{n}": SimpleNamespace(is_cuda=is_cuda) if n in asked else None for n in NAMES}

    def post(**arguments: Any) -> Any:
        works = {n: Work(n, log) for n in asked}
        return works if kind == "dict" else list(works.values())[: 1 if kind == "coalesced" else None]

    requests = SendRequests()

    def run() -> None:
        posted = requests.wrap(post)(**tensors)
        assert isinstance(posted, dict if kind == "dict" else list)
        works = list(posted.values()) if isinstance(posted, dict) else posted
        assert [w.name for w in works] == list(asked)[: len(works)]  # everything else of a request is its own
        assert all(w.wait() for w in works)

    if not watch:
        run()
        return log
    with requests.watched(lambda: log.append("taken")):
        run()
    return log


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_what_a_call_sends_is_taken_when_its_last_send_was_waited_for(kind: str) -> None:
    assert call(("send_next", "recv_next"), kind=kind) == ["send_next", "taken", "recv_next"]
    assert call(("recv_prev", "send_next"), kind=kind) == ["recv_prev", "send_next", "taken"]
    assert call(NAMES, kind=kind) == ["send_prev", "recv_prev", "send_next", "taken", "recv_next"]


def test_where_the_host_cannot_see_it_a_message_counts_as_taken_at_once() -> None:
    assert call(("send_next", "recv_next"), is_cuda=True)[0] == "taken"
    assert call(("send_next", "recv_next"), kind="coalesced")[0] == "taken"


def test_calls_that_nobody_watches_stay_as_they_are() -> None:
    assert call(("send_next", "recv_next"), watch=False) == ["send_next", "recv_next"]
