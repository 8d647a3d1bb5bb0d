# SPDX-License-Identifier: Apache-2.0
"""The order in which Megatron is asked to make parameters again. Its real classes do it in ``tests/te/test_fp8.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_moetion.mcore.parameters import copy_parameters, gather_parameters


class Sharded(DistributedOptimizer):
    """Notes what it is asked to do."""

    def __init__(self, name: str, calls: list[str], ddp_config: Any) -> None:
        self.name, self.calls, self.ddp_config = name, calls, ddp_config
        self.optimizer = SimpleNamespace(param_groups=[])

    def _copy_main_params_to_model_params(self) -> None:
        self.calls.append(f"{self.name}: copy or quantise")

    def _copy_main_params_to_param_buffer(self) -> None:
        self.calls.append(f"{self.name}: stage")


class Whole(Float16OptimizerWithFloat16Params):
    """One whose parameters no other rank has a part of."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.optimizer = SimpleNamespace(param_groups=[])

    def _copy_main_params_to_model_params(self) -> None:
        self.calls.append("whole: copy")


class Group:
    """The buckets that are gathered together."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        assert skip_next_bucket_dispatch, "all are under way already"
        self.calls.append(f"{self.name}: wait")


class Chunk:
    """A wrapped model chunk."""

    def __init__(self, name: str, calls: list[str], ddp_config: Any) -> None:
        self.name, self.calls, self.ddp_config = name, calls, ddp_config
        self.bucket_groups = [Group(f"{name} dense", calls)]
        self.expert_parallel_bucket_groups = [Group(f"{name} experts", calls)]

    def zero_grad_buffer(self) -> None:
        self.calls.append(f"{self.name}: zero gradients")

    def start_param_sync(self, *, force_sync: bool = False, force_dispatch: bool = False) -> None:
        assert force_sync != force_dispatch
        self.calls.append(f"{self.name}: {'gather' if force_sync else 'begin to gather'}")


def order(*, quantised: bool, shared: bool = False, overlapped: bool = False, sharded: bool = True) -> list[list[str]]:
    """Calls of ``copy_parameters``, in which no rank may need another, and of ``gather_parameters``."""
    config = SimpleNamespace(
        use_distributed_optimizer=sharded,
        overlap_param_gather=overlapped,
        fp8_param_gather=quantised,
        reuse_grad_buf_for_mxfp8_param_ag=shared,
    )
    calls: list[str] = []
    links: list[Any] = [Sharded("dense", calls, config), Sharded("experts", calls, config)]
    chunks: Any = [Chunk("first", calls, config), Chunk("second", calls, config)]
    copy_parameters(links)
    alone = list(calls)
    calls.clear()
    gather_parameters(chunks, links)
    return [alone, calls]


def test_plain_parameters_are_copied_by_each_rank_alone_and_then_gathered() -> None:
    alone, together = order(quantised=False)
    assert alone == ["dense: copy or quantise", "experts: copy or quantise"]
    assert together == ["first: gather", "second: gather"]


def test_without_a_distributed_optimizer_nothing_is_gathered() -> None:
    calls: list[str] = []
    config = SimpleNamespace(use_distributed_optimizer=False, reuse_grad_buf_for_mxfp8_param_ag=False)
    links: Any = [Whole(calls)]
    chunks: Any = [Chunk("first", calls, config)]
    copy_parameters(links)
    gather_parameters(chunks, links)
    assert calls == ["whole: copy"]


@pytest.mark.parametrize("overlapped", [False, True])
def test_quantised_parameters_are_made_by_all_ranks_together(overlapped: bool) -> None:
    """The scale of a parameter takes all of its shards, so quantising comes in the collective part."""
    alone, together = order(quantised=True, overlapped=overlapped)
    assert alone == []
    assert together[:2] == ["dense: copy or quantise", "experts: copy or quantise"]
    assert together[2:] == (gathered() if overlapped else ["first: gather", "second: gather"])


@pytest.mark.parametrize("overlapped", [False, True])
def test_shared_memory_is_cleared_and_filled_by_all_optimizers_before_any_gather(overlapped: bool) -> None:
    """A gather that comes too early makes parameters out of gradients, or of zeros."""
    alone, together = order(quantised=True, shared=True, overlapped=overlapped)
    assert alone == []
    assert together[:4] == ["first: zero gradients", "second: zero gradients", "dense: stage", "experts: stage"]
    assert together[4:] == (gathered() if overlapped else ["first: gather", "second: gather"])


def test_an_overlapped_gather_is_waited_for() -> None:
    assert order(quantised=False, overlapped=True)[1] == gathered()


def gathered() -> list[str]:
    return [
        call
        for name in ("first", "second")
        for call in (f"{name}: begin to gather", f"{name} dense: wait", f"{name} experts: wait")
    ]
