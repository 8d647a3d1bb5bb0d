# SPDX-License-Identifier: Apache-2.0
"""Tells the recorder when Megatron-Core communicates (megatron-core 0.16 and 0.19).

Pipeline traffic is seen by a ``P2PCommunicator`` that the loop passes to the schedule, or to Megatron's ``pretrain()``.
For the rest Megatron has no hooks: from ``TrafficHooks(...)`` to ``close`` these methods of single objects, and no
attribute of a class or module, are replaced by functions that call them:

- ``token_dispatch`` and ``token_combine`` of each MoE layer's ``token_dispatcher``, with more than one expert rank;
- ``start_grad_sync``, ``finish_grad_sync``, ``start_param_sync`` and ``finish_param_sync`` of each bucket group of the
  DDP wrappers, with more than one rank to reduce over.

What stays on this rank's node is left alone, unless a trace is to show it: no window depends on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_model_config
from torch import distributed as dist

from megatron_moetion.mcore import cpu_device
from megatron_moetion.mcore.replace import Wrap, replace_method
from megatron_moetion.schedule.recorder import OpenSpan, Recorder
from megatron_moetion.schedule.timeline import Lane


class TimedCommunicator(P2PCommunicator):
    """A ``P2PCommunicator`` that records what it sends and how long it waits, while a run watches it.

    ``on_device`` says whether its tensors are on a GPU. Sends by the settings of ``config``, and by nothing else of it.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: Any, *, on_device: bool) -> None:
        if not on_device:
            # Megatron gives requests back only where it posts them one by one. Between two stages it then sends one
            # direction over the default group, as it does by itself where virtual stages overlap their messages.
            config = copy.copy(config)
            config.batch_p2p_comm = False
        super().__init__(pp_group, config)
        self._recorder: Recorder | None = None
        self._crosses = False
        self._on_device = on_device

    def watch(self, recorder: Recorder, *, crosses: bool) -> None:
        """Record from here on. ``crosses``: whether the pipeline's ranks lie on several nodes."""
        self._recorder = recorder
        self._crosses = crosses

    def unwatch(self) -> None:
        """Record no more; messages go on."""
        self._recorder = None

    def _communicate(self, *, wait_on_reqs: bool = True, **call: Any) -> Any:
        recorder = self._recorder
        if recorder is None or (self._on_device and not recorder.is_watching):
            return super()._communicate(**call, wait_on_reqs=wait_on_reqs)
        sent = sum(_nbytes(call[side]) for side in ("tensor_send_next", "tensor_send_prev"))
        element = torch.empty(0, dtype=self.config.pipeline_dtype).element_size()
        expected = int(torch.Size(call["tensor_shape"] or ()).numel()) * element
        received = expected * (bool(call["recv_prev"]) + bool(call["recv_next"]))
        lane = Lane.PIPELINE if sent else Lane.WAIT
        span = recorder.begin(lane, sent * self._crosses, received * self._crosses)
        try:
            if sent and self._on_device:
                recorder.accepted(span)  # a stream waits for its requests, unseen by the host: as good as sent
            if not sent or self._on_device or not wait_on_reqs:
                return super()._communicate(**call, wait_on_reqs=wait_on_reqs)
            previous, following, requests = super()._communicate(**call, wait_on_reqs=False)
            # All are posted, and all are waited for. Gloo keeps a message until its receiver asks for it; with the
            # sends first, no late answer hides when that was.
            sends = [name for name in requests if name.startswith("send")]
            for name in sends:
                requests.pop(name).wait()
            recorder.accepted(span)
            for request in requests.values():
                request.wait()
            return previous, following, None
        finally:
            recorder.end(span)


def pipeline_arguments(config: Any, *, on_device: bool | None = None) -> dict[str, Any]:
    """``p2p_communicator`` and ``pg_collection`` for Megatron's schedules, or for its ``pretrain()``.

    Both take them before there is a model: call this once ``initialize_model_parallel`` is done, and give the
    communicator to ``attach(p2p_communicator=...)``. ``config`` is the model's ``TransformerConfig``, or has the same
    settings of a ``ModelParallelConfig``. ``on_device`` says whether the model is on a GPU; None: it will be, if there
    is one. Empty where there is no pipeline, so that no rank needs a case of its own.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return {}
    if on_device is None:
        on_device = torch.cuda.is_available() and not cpu_device.is_installed()
    communicator = TimedCommunicator(group, config, on_device=on_device)
    return {"p2p_communicator": communicator, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}


class TrafficHooks:
    """Hooks on one rank's model, on what leaves its node; with ``sees_all`` also on what does not.

    ``share_elsewhere`` says which share of a set of global ranks is on other nodes than this rank. ``communicator`` is
    the one that the schedule was given; without it ``pipeline_arguments`` has one to give.
    """

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        recorder: Recorder,
        share_elsewhere: Callable[[Sequence[int]], float],
        *,
        sees_all: bool,
        communicator: TimedCommunicator | None = None,
    ) -> None:
        self._recorder = recorder
        self._share_elsewhere = share_elsewhere
        self._sees_all = sees_all
        self.pipeline_arguments: dict[str, Any] = {}
        """For the schedule, where it was given none before: ``p2p_communicator`` and ``pg_collection``.

        Empty where there is no pipeline, or none to be seen.
        """
        with ExitStack() as self._undo:
            self._watch_pipeline(model, communicator)
            for chunk in model:
                for layer in chunk.modules():
                    if isinstance(layer, MoELayer):
                        self._watch_experts(layer)
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    self._watch_buckets(group)
            self._undo = self._undo.pop_all()  # all are on: they stay until ``close``

    def close(self) -> None:
        """Put all methods back."""
        self._undo.close()

    # -- the pipeline ----------------------------------------------------------------------------------

    def _watch_pipeline(self, model: Sequence[DistributedDataParallel], given: TimedCommunicator | None) -> None:
        ranks = _ranks(parallel_state.get_pipeline_model_parallel_group())
        crosses = self._share_elsewhere(ranks) > 0
        if len(ranks) == 1 or not (crosses or self._sees_all):
            return
        communicator = given
        if communicator is None:
            on_device = next(model[0].parameters()).is_cuda
            self.pipeline_arguments = pipeline_arguments(get_model_config(model[0]), on_device=on_device)
            communicator = self.pipeline_arguments["p2p_communicator"]
        communicator.watch(self._recorder, crosses=crosses)
        self._undo.callback(communicator.unwatch)

    # -- experts ---------------------------------------------------------------------------------------

    def _watch_experts(self, layer: MoELayer) -> None:
        ranks = _ranks(parallel_state.get_expert_model_parallel_group())
        remote = self._share_elsewhere(ranks)
        if len(ranks) == 1 or not (remote or self._sees_all):
            return
        wrap = dispatcher_hook(self._recorder, remote)
        for name in ("token_dispatch", "token_combine"):
            replace_method(layer.token_dispatcher, name, wrap, self._undo)

    # -- buckets ---------------------------------------------------------------------------------------

    def _watch_buckets(self, group: Any) -> None:
        is_sharded = group.ddp_config.use_distributed_optimizer
        ranks = _ranks(group.intra_distributed_optimizer_instance_group if is_sharded else group.data_parallel_group)
        remote = self._share_elsewhere(ranks)
        if len(ranks) == 1 or not (remote or self._sees_all):
            return
        gradients = sum(_nbytes(bucket.grad_data) for bucket in group.buckets)
        parameters = sum(_parameter_bytes(bucket) for bucket in group.buckets)
        for lane, kind, nbytes, handle in (
            (Lane.GRADIENT, "grad", gradients, "grad_reduce_handle"),
            (Lane.PARAMETER, "param", parameters, "param_gather_handle"),
        ):
            is_under_way = partial(_is_set, group, handle)
            start, finish = _from_start_to_finish(self._recorder, lane, int(nbytes * remote), is_under_way)
            replace_method(group, f"start_{kind}_sync", start, self._undo)
            replace_method(group, f"finish_{kind}_sync", finish, self._undo)


def dispatcher_hook(recorder: Recorder, remote: float) -> Wrap:
    """A wrapper of a token dispatcher's exchange, forward and backward; ``remote``: the share that leaves the node."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
            if not recorder.is_watching:
                return original(hidden, *more, **named)
            moved = int(_nbytes(hidden) * remote)
            span = recorder.begin(Lane.ALL_TO_ALL, moved, moved)
            try:
                result = original(hidden, *more, **named)
            finally:
                recorder.end(span)
            output = result[0] if isinstance(result, tuple) else result
            if output.grad_fn is not None and hidden.grad_fn is not None:
                _watch_backward(recorder, output.grad_fn, hidden.grad_fn, moved)
            return result

        return call

    return wrap


def _from_start_to_finish(
    recorder: Recorder, lane: Lane, moved: int, is_under_way: Callable[[], bool]
) -> tuple[Wrap, Wrap]:
    """Wrappers for a pair of calls: one span from the start to the finish, or to the end of a synchronous start."""
    opened: list[OpenSpan] = []

    def end() -> None:
        while opened:
            recorder.end(opened.pop())

    def start(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            opened.append(recorder.begin(lane, moved, moved))
            result = original(*args, **named)
            if not is_under_way():
                end()
            return result

        return call

    def finish(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            end()
            return result

        return call

    return start, finish


def _is_set(group: Any, handle: str) -> bool:
    return getattr(group, handle) is not None


def _parameter_bytes(bucket: Any) -> int:
    """What a gather of all of a bucket's parameters moves. Without a sharded buffer parameters go one by one (0.19)."""
    if bucket.param_data is not None:
        return _nbytes(bucket.param_data)
    return sum(_nbytes(parameter) for parameter in bucket.params_list)


def _watch_backward(recorder: Recorder, last: Any, before: Any, moved: int) -> None:
    """The same communication again, from when the gradient comes to its ``last`` node to the one ``before`` its first.

    Hooks on nodes of the graph cost half of what those on tensors do, which torch makes of them.
    """
    opened: list[OpenSpan] = []

    def begin(_: Any) -> None:
        opened.append(recorder.begin(Lane.ALL_TO_ALL, moved, moved))

    def end(_: Any) -> None:
        while opened:
            recorder.end(opened.pop())

    last.register_prehook(begin)
    before.register_prehook(end)


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return list(dist.get_process_group_ranks(group))


def elsewhere(node_of: Sequence[int], rank: int) -> Callable[[Sequence[int]], float]:
    """Which share of some ranks, this one among them, is on other nodes than ``rank``.

    It is the share of what a rank holds that an exchange with equal parts for all moves to other nodes.
    """
    return lambda ranks: sum(node_of[r] != node_of[rank] for r in ranks) / len(ranks)
