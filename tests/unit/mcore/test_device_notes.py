# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` says of CUDA graphs and hardware queues, and the one combination that it refuses."""

from __future__ import annotations

from enum import Enum
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.device_notes import check_graphs, connections_note, graph_note, graph_settings


class Scope(Enum):
    """As megatron-core 0.19 has it."""

    attn = 1
    moe_router = 2


def config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **fields)


def test_of_a_model_without_graphs_nothing_is_said() -> None:
    assert graph_settings(config()) == {}
    assert graph_note({}) is None
    check_graphs({}, recalibrates=True)


def test_settings_of_graphs_are_named_with_what_they_mean() -> None:
    """Of both versions; in 0.16 a deprecated switch has become an implementation by then."""
    parts = (
        "cuda_graph_modules" if "cuda_graph_modules" in signature(TransformerConfig).parameters else "cuda_graph_scope"
    )
    now = graph_settings(config(cuda_graph_impl="local", **{parts: ["attn"]}))
    assert graph_note(now) == (
        f"CUDA graphs are on (cuda_graph_impl=local, {parts}=[attn]): not tested with checkpointing. Traffic "
        "inside a graph is not seen, so an iteration seems to have more room for snapshots than it has"
    )
    later = SimpleNamespace(
        cuda_graph_impl="transformer_engine",
        enable_cuda_graph=False,
        external_cuda_graph=False,
        cuda_graph_scope=None,
        cuda_graph_modules=[Scope.attn, Scope.moe_router],
    )
    said = graph_note(graph_settings(later))
    assert said is not None
    assert "cuda_graph_impl=transformer_engine, cuda_graph_modules=[attn, moe_router])" in said
    old = graph_settings(SimpleNamespace(enable_cuda_graph=True))
    assert old == {"enable_cuda_graph": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda_graph_impl": "local", "cuda_graph_scope": []},
        {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [Scope.attn, Scope.moe_router]},
        {"cuda_graph_impl": "local", "cuda_graph_scope": "full"},
        {"enable_cuda_graph": True},
    ],
)
def test_a_captured_router_and_capacities_that_change_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--moetion-capacity-recalibration on changes .* keeps the one that it was"):
        check_graphs(settings, recalibrates=True)
    check_graphs(settings, recalibrates=False)


def test_graphs_of_attention_alone_are_no_matter_to_capacities() -> None:
    check_graphs({"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.attn]}, recalibrates=True)


def test_one_hardware_queue_is_warned_of() -> None:
    assert connections_note({}) is None
    assert connections_note({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}) is None
    said = connections_note({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert said is not None
    assert "all streams share one hardware queue" in said
