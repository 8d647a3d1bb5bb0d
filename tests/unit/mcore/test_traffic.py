# SPDX-License-Identifier: Apache-2.0
"""Which request of a pipeline call tells that the network has what it sends. Real ones: ``dist/test_traffic.py``."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import p2p_communication

from megatron_moetion.mcore.traffic import telling_of_sends

NAMES = ("send_prev", "recv_prev", "send_next", "recv_next")
ODD_RANK = ("recv_prev", "send_next", "recv_next", "send_prev")
"""The order in which every second stage posts requests one by one."""


class Work:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait(self) -> bool:
        self._log.append(self.name)
        return True


def call(monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], kind: str = "list", *, is_cuda: bool = False) -> Any:
    """What happens, in order, when a call posts these requests and waits for all of them."""
    log: list[str] = []
    tensors = {f"tensor_{n}": SimpleNamespace(is_cuda=is_cuda) if n in asked else None for n in NAMES}

    def post(**arguments: Any) -> Any:
        works = {n: Work(n, log) for n in asked}
        return works if kind == "dict" else list(works.values())[: 1 if kind == "coalesced" else None]

    name = "_p2p_ops" if kind == "dict" else "_batched_p2p_ops"
    monkeypatch.setattr(p2p_communication, name, post)
    with telling_of_sends(lambda: log.append("taken")):
        posted = getattr(p2p_communication, name)(**tensors)
    assert getattr(p2p_communication, name) is post
    works = posted if isinstance(posted, list) else list(posted.values())
    assert isinstance(posted, dict if kind == "dict" else list)
    if isinstance(posted, dict):
        assert {n: w.name for n, w in posted.items()} == {n: n for n in asked}  # a request stays what it was
    assert all(w.wait() for w in works)
    return log


@pytest.mark.parametrize(
    ("asked", "kind", "expected"),
    [
        (("send_next", "recv_next"), "list", "send_next taken recv_next"),
        (("recv_prev", "send_next"), "list", "send_next taken recv_prev"),
        (NAMES, "list", "send_prev send_next taken recv_prev recv_next"),
        (("recv_prev", "send_prev"), "dict", "send_prev taken recv_prev"),
        (ODD_RANK, "dict", "send_prev send_next taken recv_prev recv_next"),
    ],
)
def test_sends_are_waited_for_first_and_then_the_network_has_them(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], kind: str, expected: str
) -> None:
    assert call(monkeypatch, asked, kind) == expected.split()


def test_where_the_host_cannot_see_it_a_message_counts_as_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, ("send_next", "recv_next"), is_cuda=True) == ["taken", "send_next", "recv_next"]
    assert call(monkeypatch, ("send_next", "recv_next"), "coalesced") == ["taken", "send_next"]


@pytest.fixture
def log() -> Iterator[list[str]]:
    posting = dict(vars(p2p_communication))
    yield []
    assert dict(vars(p2p_communication)) == posting


@pytest.mark.parametrize("answer", [None, ("a", "b"), {"other": 1}, [1, 2, 3]])
def test_what_a_later_megatron_may_answer_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, log: list[str], answer: Any
) -> None:
    with monkeypatch.context() as later:
        later.setattr(p2p_communication, "_p2p_ops", lambda *tensors, **named: answer)
        with telling_of_sends(lambda: log.append("taken")):
            assert p2p_communication._p2p_ops("x", tensor_send_next=SimpleNamespace(is_cuda=False)) is answer
    assert log == ["taken"]


def test_a_fault_while_posting_leaves_megatron_as_it_was(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    def post(**tensors: Any) -> Any:
        raise RuntimeError("lost")

    with monkeypatch.context() as faulty:
        faulty.setattr(p2p_communication, "_p2p_ops", post)
        with pytest.raises(RuntimeError, match="lost"), telling_of_sends(lambda: log.append("taken")):
            p2p_communication._p2p_ops()
        assert p2p_communication._p2p_ops is post
    assert log == []
