# SPDX-License-Identifier: Apache-2.0
"""Which traffic is watched, and which request of a pipeline call tells that the network has what it sends.

Real requests: ``dist/test_traffic.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from support import ManualClock

from megatron_moetion.clock import SystemClock
from megatron_moetion.mcore import cpu_device, traffic
from megatron_moetion.mcore.traffic import TimedCommunicator, TrafficHooks, elsewhere, pipeline_arguments
from megatron_moetion.schedule.recorder import HostStopwatch, Recorder
from megatron_moetion.schedule.timeline import Lane, Timeline

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
    monkeypatch: pytest.MonkeyPatch,
    posted: tuple[str, ...],
    *,
    on_device: bool = False,
    waits: bool = True,
    watched: bool = True,
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
    stage = TimedCommunicator(None, config, on_device=on_device)
    if watched:
        stage.watch(Listening(log), crosses=True)
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


@pytest.mark.parametrize("waits", [True, False])
def test_before_a_run_watches_it_messages_go_as_megatron_sends_them(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """One by one all the same: both ends of a pipeline have to post alike, whoever watches first."""
    log, found = call(monkeypatch, ("recv_next", "send_next"), watched=False, waits=waits)
    assert log == ["posted one by one", *(["recv_next", "send_next"] if waits else [])]
    assert (found[2] is None) == waits


class Dispatcher:
    """Exchanges nothing."""

    def token_dispatch(self, hidden: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden * 1.0, probs

    def token_combine(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 1.0


class Buckets:
    """A bucket group whose calls are synchronous."""

    grad_reduce_handle = param_gather_handle = None
    ddp_config = SimpleNamespace(use_distributed_optimizer=False)
    data_parallel_group = "all"
    buckets = (SimpleNamespace(grad_data=torch.zeros(100), param_data=torch.zeros(100)),)

    def start_grad_sync(self) -> None: ...

    def finish_grad_sync(self) -> None: ...

    def start_param_sync(self) -> None: ...

    def finish_param_sync(self) -> None: ...


def watch(
    monkeypatch: pytest.MonkeyPatch,
    node_of: Sequence[int],
    experts: Sequence[int],
    recorder: Recorder,
    *,
    sees_all: bool = False,
) -> tuple[TrafficHooks, Dispatcher, Buckets]:
    """Hooks on rank 0 of a model with a layer of experts on some ranks; all ranks reduce gradients."""
    ranks = {"experts": experts, "all": range(len(node_of)), "pipeline": [0]}
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: ranks[group])
    monkeypatch.setattr(parallel_state, "get_expert_model_parallel_group", lambda: "experts")
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: "pipeline")
    layer: Any = MoELayer.__new__(MoELayer)
    torch.nn.Module.__init__(layer)
    layer.token_dispatcher, buckets = Dispatcher(), Buckets()
    model: Any = SimpleNamespace(
        config=SimpleNamespace(),
        modules=lambda: [layer],
        parameters=lambda: iter([TENSOR]),
        bucket_groups=[buckets],
        expert_parallel_bucket_groups=[],
    )
    return TrafficHooks([model], recorder, elsewhere(node_of, 0), sees_all=sees_all), layer.token_dispatcher, buckets


def train(dispatcher: Dispatcher, buckets: Buckets) -> None:
    """A forward and a backward pass through a layer, then gradients."""
    source = torch.zeros(8, requires_grad=True)
    hidden, _ = dispatcher.token_dispatch(source * 1.0, TENSOR)
    dispatcher.token_combine(hidden * 1.0).sum().backward()
    buckets.start_grad_sync()
    buckets.finish_grad_sync()


def seen(recorder: Recorder) -> list[tuple[Lane, int]]:
    found = recorder.cut(1)
    assert isinstance(found, Timeline)
    return [(s.lane, s.sent_bytes) for s in found.spans]


def manual() -> Recorder:
    return Recorder(HostStopwatch(ManualClock()), ManualClock())


def test_of_what_ranks_exchange_the_share_on_other_nodes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two nodes: half of the ranks are elsewhere. Dispatch and combine, forward and backward."""
    recorder = manual()
    _, dispatcher, buckets = watch(monkeypatch, [0, 0, 1, 1], [0, 1, 2, 3], recorder)
    train(dispatcher, buckets)
    assert seen(recorder) == [(Lane.ALL_TO_ALL, 16)] * 4 + [(Lane.GRADIENT, 200)]
    assert elsewhere([0, 0, 1, 1], 2)([0, 1, 2, 3]) == 0.5
    assert elsewhere([0, 0, 1, 1], 2)([2, 3]) == 0


def test_what_stays_on_the_node_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = manual()
    hooks, dispatcher, buckets = watch(monkeypatch, [0, 0, 1, 1], [0, 1], recorder)
    assert not vars(dispatcher), "no method is replaced"
    assert vars(buckets)
    train(dispatcher, buckets)
    assert seen(recorder) == [(Lane.GRADIENT, 200)]
    assert hooks.pipeline_arguments == {}
    hooks.close()
    assert not vars(buckets)
    alone = watch(monkeypatch, [0, 0, 0, 0], [0, 1, 2, 3], recorder)
    assert not vars(alone[1])
    assert not vars(alone[2])


def test_a_trace_shows_what_stays_on_the_node_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = manual()
    _, dispatcher, buckets = watch(monkeypatch, [0, 0, 1, 1], [0, 1], recorder, sees_all=True)
    train(dispatcher, buckets)
    assert seen(recorder) == [(Lane.ALL_TO_ALL, 0)] * 4 + [(Lane.GRADIENT, 200)]


def test_where_nobody_needs_an_iterations_spans_its_graph_has_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = manual()
    _, dispatcher, _ = watch(monkeypatch, [0, 0, 1, 1], [0, 1, 2, 3], recorder)
    recorder.cut(0, records_next=False)
    source = torch.zeros(8, requires_grad=True)
    hidden, _ = dispatcher.token_dispatch(source * 1.0, TENSOR)
    recorder.cut(1)
    hidden.sum().backward()
    assert seen(recorder) == []


def test_a_fault_in_a_call_still_ends_its_span(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []

    class Ear:
        def traffic_begins(self, lane: Lane, sent_bytes: int) -> None: ...

        def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
            ends.append(sent_bytes)

    def fails(*_: Any) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(Dispatcher, "token_combine", fails)
    recorder = Recorder(HostStopwatch(ManualClock()), ManualClock(), Ear())
    _, dispatcher, _ = watch(monkeypatch, [0, 0, 1, 1], [0, 1, 2, 3], recorder)
    with pytest.raises(RuntimeError):
        dispatcher.token_combine(torch.zeros(8))
    assert ends == [16]


@pytest.mark.parametrize(
    ("available", "stands_in", "told", "on_device"),
    [
        (True, False, None, True), (False, False, None, False), (True, True, None, False), (True, False, False, False),
        (False, False, True, True),
    ],
)  # fmt: skip
def test_a_device_is_where_the_model_is_whatever_a_groups_backend_is_called(
    monkeypatch: pytest.MonkeyPatch, available: bool, stands_in: bool, told: bool | None, on_device: bool
) -> None:
    """A group of ``init_process_group()`` without a backend is called 'undefined' or 'cpu:gloo,cuda:nccl'."""
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: group)
    monkeypatch.setattr(ProcessGroupCollection, "use_mpu_process_groups", lambda: "groups")
    monkeypatch.setattr(P2PCommunicator, "__init__", lambda self, group, config: setattr(self, "config", config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(cpu_device, "is_installed", lambda: stands_in)
    given = pipeline_arguments(SimpleNamespace(batch_p2p_comm=True), on_device=told)
    assert given["pg_collection"] == "groups"
    assert given["p2p_communicator"].config.batch_p2p_comm == on_device, "posted one by one on the host"


@pytest.mark.parametrize("on_device", [True, False])
def test_hooks_make_a_communicator_for_where_the_model_is(monkeypatch: pytest.MonkeyPatch, on_device: bool) -> None:
    told: list[bool] = []
    communicator = SimpleNamespace(watch=lambda *_, **__: None, unwatch=lambda: None)

    def arguments(config: Any, *, on_device: bool) -> dict[str, Any]:
        told.append(on_device)
        return {"p2p_communicator": communicator}

    monkeypatch.setattr(traffic, "pipeline_arguments", arguments)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: "pipeline")
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [0, 1])
    model: Any = SimpleNamespace(
        config=SimpleNamespace(),
        modules=list,
        parameters=lambda: iter([SimpleNamespace(is_cuda=on_device)]),
        bucket_groups=[],
        expert_parallel_bucket_groups=[],
    )
    TrafficHooks([model], manual(), elsewhere([0, 1], 0), sees_all=False).close()
    assert told == [on_device]
