# SPDX-License-Identifier: Apache-2.0
"""Which request of a pipeline call tells that the network has what it sends. Real ones: ``dist/test_traffic.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_moetion.clock import SystemClock
from megatron_moetion.mcore.traffic import TimedCommunicator
from megatron_moetion.schedule.recorder import HostStopwatch, Recorder

TENSOR = torch.zeros(4)


class Request:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait(self) -> bool:
        self._log.append(self.name)
        return True


class Listening(Recorder):
    """A recorder whose log says when the network has taken a message."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(HostStopwatch(SystemClock()), SystemClock())
        self._log = log

    def accepted(self, span: Any) -> None:
        self._log.append("taken")
        super().accepted(span)


def call(
    monkeypatch: pytest.MonkeyPatch, posted: tuple[str, ...], *, on_device: bool = False, waits: bool = True
) -> tuple[list[str], Any]:
    """What happens in a call that posts these requests, in order, and what it gives back."""
    log: list[str] = []

    def base(self: P2PCommunicator, *, wait_on_reqs: bool, **tensors: Any) -> Any:
        requests = {name: Request(name, log) for name in posted}
        log.append("posted one by one" if not self.config.batch_p2p_comm else "posted")
        if not wait_on_reqs:
            return "previous", "following", requests
        for request in requests.values():
            request.wait()
        return "previous", "following", None

    monkeypatch.setattr(P2PCommunicator, "__init__", lambda self, group, config: setattr(self, "config", config))
    monkeypatch.setattr(P2PCommunicator, "_communicate", base)
    config = SimpleNamespace(pipeline_dtype=torch.float32, batch_p2p_comm=True)
    stage = TimedCommunicator(None, config, Listening(log), crosses=True, on_device=on_device)
    found = stage._communicate(
        tensor_send_next=TENSOR if "send_next" in posted else None,
        tensor_send_prev=TENSOR if "send_prev" in posted else None,
        recv_prev="recv_prev" in posted,
        recv_next="recv_next" in posted,
        tensor_shape=(4,),
        wait_on_reqs=waits,
    )
    assert config.batch_p2p_comm, "training's own settings stay as they are"
    return log, found


@pytest.mark.parametrize(
    ("posted", "expected"),
    [
        (("send_next", "recv_next"), "send_next taken recv_next"),
        (("recv_prev", "send_next"), "send_next taken recv_prev"),
        (("recv_prev", "send_next", "recv_next", "send_prev"), "send_next send_prev taken recv_prev recv_next"),
    ],
)
def test_sends_are_waited_for_first_and_then_the_network_has_them(
    monkeypatch: pytest.MonkeyPatch, posted: tuple[str, ...], expected: str
) -> None:
    log, found = call(monkeypatch, posted)
    assert log == ["posted one by one", *expected.split()]
    assert found == ("previous", "following", None)


def test_a_call_that_sends_nothing_is_megatrons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, ("recv_prev",))[0] == ["posted one by one", "recv_prev"]


def test_where_a_stream_waits_a_message_counts_as_taken_when_it_is_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And requests are posted as training asks for."""
    log, _ = call(monkeypatch, ("recv_next", "send_next"), on_device=True)
    assert log == ["taken", "posted", "recv_next", "send_next"]


def test_requests_that_training_waits_for_itself_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    log, (*_, requests) = call(monkeypatch, ("recv_next", "send_next"), waits=False)
    assert log == ["posted one by one"]
    assert list(requests) == ["recv_next", "send_next"]
