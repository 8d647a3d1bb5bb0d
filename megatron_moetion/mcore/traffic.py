# SPDX-License-Identifier: Apache-2.0
"""Tells the recorder when Megatron-Core communicates. Every hook is put on an object and taken off by ``close``.

Seams: a ``P2PCommunicator`` that the loop passes to the schedule, and during its calls the functions that post
requests; the token dispatcher's ``token_dispatch`` and ``token_combine``; a bucket group's ``start_`` and ``finish_``
``grad_sync`` and ``param_sync`` (megatron-core 0.16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_model_config
from torch import distributed as dist

from megatron_moetion.schedule.recorder import Recorder
from megatron_moetion.schedule.timeline import Lane


class TimedCommunicator(P2PCommunicator):
    """A ``P2PCommunicator`` that records what it sends and how long it waits."""

    def __init__(self, pp_group: dist.ProcessGroup, config: Any, recorder: Recorder, crosses: bool) -> None:
        super().__init__(pp_group, config)
        self._recorder = recorder
        self._crosses = crosses

    def _communicate(self, **call: Any) -> Any:
        sent = sum(_nbytes(call[side]) for side in ("tensor_send_next", "tensor_send_prev"))
        element = torch.empty(0, dtype=self.config.pipeline_dtype).element_size()
        expected = int(torch.Size(call["tensor_shape"] or ()).numel()) * element
        received = expected * (bool(call["recv_prev"]) + bool(call["recv_next"]))
        lane = Lane.PIPELINE if sent else Lane.WAIT
        with self._recorder.span(lane, sent * self._crosses, received * self._crosses) as span:
            if not sent:
                return super()._communicate(**call)
            with telling_of_sends(lambda: self._recorder.taken(span)):
                return super()._communicate(**call)


@contextmanager
def telling_of_sends(taken: Callable[[], None]) -> Iterator[None]:
    """``taken`` is called once the network has taken what Megatron's pipeline call inside sends.

    That is before the call returns. Gloo keeps a message until its receiver asks for it, which may be late; the
    training thread waits for that. A device's requests are waited for by its stream, out of the host's sight: there,
    and where Megatron posts requests in another way than this knows, a message counts as taken when it is posted.
    """
    posting = {name: post for name in _POSTING if (post := vars(p2p_communication).get(name)) is not None}
    for name, post in posting.items():
        setattr(p2p_communication, name, _telling(post, taken))
    try:
        yield
    finally:
        for name, post in posting.items():
            setattr(p2p_communication, name, post)


_POSTING = ("_batched_p2p_ops", "_p2p_ops")
"""The functions that post the requests of a call: a list in the order of ``_REQUESTS``, or a dict."""
_REQUESTS = ("send_prev", "recv_prev", "send_next", "recv_next")


def _telling(post: Callable[..., Any], taken: Callable[[], None]) -> Callable[..., Any]:
    def call(*positional: Any, **arguments: Any) -> Any:
        requests = post(*positional, **arguments)
        asked = [n for n in _REQUESTS if arguments.get(f"tensor_{n}") is not None]
        sends = [n for n in asked if n.startswith("send")]
        named: dict[str, Any] = {}
        if isinstance(requests, dict) and requests.keys() == set(asked):
            named = requests
        elif isinstance(requests, list) and len(requests) == len(asked):
            named = dict(zip(asked, requests, strict=True))
        if not named or not sends or arguments[f"tensor_{sends[0]}"].is_cuda:
            taken()
            return requests
        # All are posted and Megatron waits for all of them; with the sends first, no late answer hides when they went.
        named = {n: named[n] for n in (*sends, *asked)}
        named[sends[-1]] = _Waited(named[sends[-1]], taken)
        return named if isinstance(requests, dict) else list(named.values())

    return call


class _Waited:
    """A request, and what to call after it was waited for."""

    def __init__(self, work: dist.Work, then: Callable[[], None]) -> None:
        self._work = work
        self._then = then

    def wait(self, *limits: Any) -> bool:
        done = self._work.wait(*limits)
        self._then()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class TrafficHooks:
    """Hooks on one rank's model. ``crosses`` says whether a set of global ranks spans nodes."""

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        recorder: Recorder,
        crosses: Callable[[Sequence[int]], bool],
    ) -> None:
        self._recorder = recorder
        self._crosses = crosses
        self._config = get_model_config(model[0])
        with ExitStack() as self._undo:
            for chunk in model:
                for layer in chunk.modules():
                    if isinstance(layer, MoELayer):
                        self._watch_experts(layer)
                for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                    self._watch_buckets(group)
            self._undo = self._undo.pop_all()  # all are on: they stay until ``close``

    def pipeline_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the schedule, ``p2p_communicator`` and ``pg_collection``; none without a pipeline."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return {}
        group = parallel_state.get_pipeline_model_parallel_group()
        groups = ProcessGroupCollection()
        groups.tp = parallel_state.get_tensor_model_parallel_group()
        groups.cp = parallel_state.get_context_parallel_group()
        groups.pp = group
        groups.embd = parallel_state.get_embedding_group(check_initialized=False)
        groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
        groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
        communicator = TimedCommunicator(group, self._config, self._recorder, self._crosses(_ranks(group)))
        return {"p2p_communicator": communicator, "pg_collection": groups}

    def close(self) -> None:
        """Take all hooks off; of several sets of hooks on one model, the last one put on goes first."""
        self._undo.close()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, wrap(getattr(owner, name)))
        if before is None:
            self._undo.callback(delattr, owner, name)  # the class's method shows again
        else:
            self._undo.callback(setattr, owner, name, before)

    # -- experts ---------------------------------------------------------------------------------------

    def _watch_experts(self, layer: MoELayer) -> None:
        ranks = _ranks(parallel_state.get_expert_model_parallel_group())
        if len(ranks) == 1:
            return
        remote = _share_elsewhere(ranks) * self._crosses(ranks)
        recorder = self._recorder

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
                moved = int(_nbytes(hidden) * remote)
                with recorder.span(Lane.ALL_TO_ALL, moved, moved):
                    result = original(hidden, *more, **named)
                output = result[0] if isinstance(result, tuple) else result
                if output.requires_grad and hidden.requires_grad:
                    _watch_backward(recorder, output, hidden, moved)
                return result

            return call

        for name in ("token_dispatch", "token_combine"):
            self._replace(layer.token_dispatcher, name, wrap)

    # -- buckets ---------------------------------------------------------------------------------------

    def _watch_buckets(self, group: Any) -> None:
        is_sharded = group.ddp_config.use_distributed_optimizer
        ranks = _ranks(group.intra_distributed_optimizer_instance_group if is_sharded else group.data_parallel_group)
        if len(ranks) == 1:
            return
        remote = _share_elsewhere(ranks) * self._crosses(ranks)
        for lane, kind, data in ((Lane.GRADIENT, "grad", "grad_data"), (Lane.PARAMETER, "param", "param_data")):
            parts = [getattr(bucket, data) for bucket in group.buckets]
            moved = int(sum(_nbytes(part) for part in parts) * remote)
            start, finish = _from_start_to_finish(self._recorder, lane, moved, lambda: bool(_handle(group)))
            self._replace(group, f"start_{kind}_sync", start)
            self._replace(group, f"finish_{kind}_sync", finish)


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _from_start_to_finish(
    recorder: Recorder, lane: Lane, moved: int, is_under_way: Callable[[], bool]
) -> tuple[Wrap, Wrap]:
    """Wrappers for a pair of calls: one span from the start to the finish, or to the end of a synchronous start."""
    opened: list[Any] = []

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


def _handle(group: Any) -> Any:
    return group.param_gather_handle or group.grad_reduce_handle


def _watch_backward(recorder: Recorder, output: torch.Tensor, hidden: torch.Tensor, moved: int) -> None:
    """The same communication again, when the gradient passes from ``output`` to ``hidden``."""
    opened: list[Any] = []

    def begin(gradient: torch.Tensor) -> None:
        opened.append(recorder.begin(Lane.ALL_TO_ALL, moved, moved))

    def end(gradient: torch.Tensor) -> None:
        while opened:
            recorder.end(opened.pop())

    output.register_hook(begin)
    hidden.register_hook(end)


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return list(dist.get_process_group_ranks(group))


def _share_elsewhere(ranks: Sequence[int]) -> float:
    """Of what a rank holds, the share that an exchange with equal parts for all gives to others."""
    return (len(ranks) - 1) / len(ranks)


def node_crossing(node_of: Sequence[int]) -> Callable[[Sequence[int]], bool]:
    """Whether ranks lie on more than one node."""
    return lambda ranks: len({node_of[r] for r in ranks}) > 1
