# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` says of CUDA graphs and hardware queues, and the one combination that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.device_notes import (
    captures_iterations,
    check_graphs,
    connections_note,
    dispatcher_note,
    graph_note,
    graph_settings,
    padding_note,
    schedule_with_graphs,
    stash_note,
)


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


Record = Callable[[str, Any], None]


@pytest.mark.proves("CUDA graphs of layers or their parts", "note")
def test_settings_of_graphs_are_named_with_what_they_mean(record_property: Record) -> None:
    """Of both versions: a deprecated switch has become an implementation by then, and 0.19 has renamed the parts."""
    fields = signature(TransformerConfig).parameters
    name = "cuda_graph_modules" if "cuda_graph_modules" in fields else "cuda_graph_scope"
    said = graph_note(graph_settings(config(cuda_graph_impl="local", **{name: ["attn"]})))
    assert said is not None
    record_property("message", said)
    assert said == (
        f"CUDA graphs are on (cuda_graph_impl=local, {name}=[attn]), which was not tested on a GPU: captures, "
        f"recoveries and token counts work as without; traffic inside a graph is not seen, so an iteration seems to "
        f"have more room for snapshots than it has"
    )
    assert schedule_with_graphs("bubble", {"cuda_graph_impl": "local", name: [Scope.attn]}) == "bubble"
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


def whole_iteration() -> TransformerConfig:
    """As each version spells it."""
    if hasattr(TransformerConfig, "cuda_graph_modules"):
        return config(cuda_graph_impl="full_iteration", cuda_graph_modules=[])
    return config(cuda_graph_impl="local", cuda_graph_scope="full_iteration")


@pytest.mark.proves("CUDA graphs of whole iterations", "note")
def test_gaps_between_messages_that_nobody_sees_are_not_used(record_property: Record) -> None:
    settings = graph_settings(whole_iteration())
    assert captures_iterations(settings)
    said = graph_note(settings, "bubble")
    assert said is not None
    record_property("message", said)
    assert (
        "no traffic of an iteration is seen, so snapshots leave evenly (--moetion-schedule steady) and not in" in said
    )
    assert "bubble" not in str(graph_note(settings, "steady"))
    assert [schedule_with_graphs(s, settings) for s in ("bubble", "steady", "eager")] == ["steady", "steady", "eager"]
    assert schedule_with_graphs("bubble", {}) == "bubble"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({}, "DeepEP", marks=pytest.mark.proves("DeepEP (--moe-flex-dispatcher-backend deepep)", "note")),
        pytest.param({"moe_enable_deepep": True}, "DeepEP", marks=pytest.mark.proves("--moe-enable-deepep", "note")),
        pytest.param(
            {"moe_flex_dispatcher_backend": "hybridep"},
            "HybridEP",
            marks=pytest.mark.proves("HybridEP (--moe-flex-dispatcher-backend hybridep)", "note"),
        ),
    ],
)
def test_a_dispatcher_with_kernels_of_its_own_is_named(
    fields: dict[str, Any], named: str, record_property: Record
) -> None:
    said = dispatcher_note(config(moe_token_dispatcher_type="flex", num_moe_experts=2, **fields))
    assert said is not None
    record_property("message", said)
    assert said.startswith(
        f"{named} exchanges tokens (--moe-token-dispatcher-type flex, --moe-flex-dispatcher-backend "
    )
    assert "captures, recoveries and token counts do not depend on it" in said


def test_an_unknown_backend_goes_by_its_flag_and_other_dispatchers_need_no_word() -> None:
    unknown = SimpleNamespace(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="newep")
    assert str(dispatcher_note(unknown)).startswith("newep exchanges tokens")
    for name in ("allgather", "alltoall"):
        assert dispatcher_note(config(moe_token_dispatcher_type=name)) is None


@pytest.mark.proves("Paged stash", "note")
def test_iterations_that_may_run_twice_are_announced(record_property: Record) -> None:
    assert stash_note(config()) is None
    said = stash_note(SimpleNamespace(moe_paged_stash=True, moe_expert_rank_capacity_factor=1.5))
    assert said is not None
    record_property("message", said)
    assert said.startswith("moe_paged_stash is on, which was not tested on a GPU")
    assert "count once" in said
    budget = SimpleNamespace(moe_paged_stash=False, moe_expert_rank_capacity_factor=1.5)
    assert str(stash_note(budget)).startswith("moe_expert_rank_capacity_factor is on")


@pytest.mark.proves("Token counts of padded experts' inputs (FP8, FP4)", "note")
def test_padding_that_counts_as_tokens_is_owned_up_to(record_property: Record) -> None:
    flex = SimpleNamespace(moe_token_dispatcher_type="flex", fp8="hybrid")
    said = padding_note(flex, counts_tokens=True)
    assert said is not None
    record_property("message", said)
    assert padding_note(flex, counts_tokens=False) is None
    assert padding_note(SimpleNamespace(moe_token_dispatcher_type="alltoall", fp8="hybrid"), counts_tokens=True) is None
    for name in ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"):
        assert padding_note(SimpleNamespace(**{name: True}), counts_tokens=True) == said


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
@pytest.mark.proves("CUDA graphs of the router, with capacity recalibration", "refused")
def test_a_captured_router_and_capacities_that_change_do_not_go_together(
    settings: dict[str, Any], record_property: Record
) -> None:
    with pytest.raises(
        ConfigError, match=r"--moetion-capacity-recalibration on changes .* keeps the one that it was"
    ) as caught:
        check_graphs(settings, recalibrates=True)
    record_property("message", str(caught.value))
    check_graphs(settings, recalibrates=False)


def test_graphs_of_attention_alone_are_no_matter_to_capacities() -> None:
    check_graphs({"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.attn]}, recalibrates=True)


def test_one_hardware_queue_is_warned_of() -> None:
    assert connections_note({}) is None
    assert connections_note({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}) is None
    said = connections_note({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert said is not None
    assert "all streams share one hardware queue" in said
