# SPDX-License-Identifier: Apache-2.0
"""Models of the real Transformer Engine's modules on four ranks, without a GPU.

Parameters and buffers are those of the real modules; their kernels are replaced by torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

EACH = "a weight for each expert"
EACH_BIAS = "a weight and a bias for each expert, pp2"
SINGLE = "one weight for all experts"
SINGLE_BIAS = "one weight and one bias for all experts, pp2"
MIXED = "one weight for all experts, a bias for each"
ALONE = "one expert a rank"
WHOLE = "one weight for all experts, no distributed optimizer"
HYBRID = "hybrid, pp2"
SHARED = "shared experts"
ROWS = {
    EACH: "Transformer Engine, grouped experts, a weight each",
    EACH_BIAS: "Transformer Engine, grouped experts, a weight and a bias each",
    SINGLE: "Transformer Engine, grouped experts, one weight (moe_single_grouped_weight)",
    SINGLE_BIAS: "Transformer Engine, grouped experts, one weight and one bias (moe_single_grouped_bias)",
    MIXED: "Transformer Engine, grouped experts, one weight and a bias each",
    ALONE: "Transformer Engine, grouped experts, one weight, one expert a rank",
    WHOLE: "Transformer Engine, grouped experts, one weight, no distributed optimizer",
    HYBRID: "HybridModel of Transformer Engine's modules",
    SHARED: "Transformer Engine, shared experts",
}
CASES = [pytest.param(case, marks=pytest.mark.proves(row, "recovery")) for case, row in ROWS.items()]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank noted; all cases run in one launch, because imports take seconds."""
    folder: Path = tmp_path_factory.mktemp("te")
    with Nursery("te") as nursery:
        return nursery.notes(180, folder)


@pytest.fixture
def ranks(notes: list[list[dict[str, Any]]], case: str) -> list[dict[str, Any]]:
    """The ranks' findings in one case."""
    return [next(n for n in of_rank if n["event"] == "case" and n["name"] == case) for of_rank in notes]


@pytest.mark.parametrize("case", CASES)
def test_all_state_is_captured_once_and_restored_bitwise_and_so_is_the_next_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["owned"] > 50_000
        assert (found["missed"], found["twice"], found["of_others"]) == (0, 0, 0)
        assert found["moved"] is None
        assert "exp_avg" in found["moved_later"]
        assert found["scrambled"] == []
        assert found["not_restored"] == []
        assert found["step_again"] == found["step"]
        assert not found["step"]["skipped"]
        assert found["differs_after_step"] == []
        assert found["counts"] > 0
    assert any("lm loss" in found["step"]["losses"] for found in ranks)


@pytest.mark.parametrize("case", CASES)
def test_the_unit_of_an_expert_holds_that_expert(ranks: list[dict[str, Any]]) -> None:
    """The expert's number was written through what the module itself takes for its weight and bias."""
    for found in ranks:
        assert found["mislabelled"] == []
    replicas = ranks[0]["elements"][3] if ranks[0]["sharded"] else 1
    assert sum(found["marked"] for found in ranks) == sum(f["elements"][2] for f in ranks) / replicas > 0


def tensors(ranks: list[dict[str, Any]], unit: str) -> set[str]:
    """Those of a unit that the ranks hold together, without the unit's or layer's name."""
    found = {t for f in ranks for name, (_, names) in f["units"].items() if name == unit for t in names}
    return {t.removeprefix(f"{unit}.").removeprefix(f"{unit.removesuffix('.dense')}.") for t in found}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (EACH, {"linear_fc1.weight", "linear_fc2.weight"}),
        (SINGLE, {"linear_fc1.weight", "linear_fc2.weight"}),
        (EACH_BIAS, {"linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"}),
        (SINGLE_BIAS, {"linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"}),
    ],
)
def test_an_expert_has_the_same_tensors_in_both_layouts(ranks: list[dict[str, Any]], expected: set[str]) -> None:
    assert tensors(ranks, "layers.1.experts.3") == expected


@pytest.mark.parametrize("case", [EACH])
def test_norms_inside_linear_layers_and_on_their_own_are_of_the_layer(ranks: list[dict[str, Any]]) -> None:
    expected = {"self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight", "mlp.router.weight"}
    assert expected <= tensors(ranks, "layers.0.dense")
    assert tensors(ranks, "head") == {"decoder.final_layernorm.weight", "decoder.final_layernorm.bias"}


@pytest.mark.parametrize("case", [SHARED])
def test_shared_experts_are_of_the_layer(ranks: list[dict[str, Any]]) -> None:
    found = tensors(ranks, "layers.0.dense")
    assert {"mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"} <= found


@pytest.mark.parametrize("case", [HYBRID])
def test_a_hybrid_model_has_a_unit_for_each_layer(ranks: list[dict[str, Any]]) -> None:
    first = {"M": "mixer.in_proj.weight", "*": "self_attention.linear_qkv.weight", "-": "mlp.linear_fc1.weight"}
    for layer, kind in enumerate("M*E-ME*E"):
        assert first.get(kind, "mlp.router.weight") in tensors(ranks, f"layers.{layer}.dense")
        assert bool(tensors(ranks, f"layers.{layer}.experts.0")) == (kind == "E")


@pytest.mark.proves("Transformer Engine, grouped experts, one weight, mode exact", "recovery")
def test_mode_exact_loses_at_most_an_iteration_and_no_bit(notes: list[list[dict[str, Any]]]) -> None:
    for of_rank in notes:
        found = next(n for n in of_rank if n["event"] == "exact")
        assert found["wrong"] == [], (found["wrong"], found["lost"])
        assert len(found["lost"]) == 3
        assert max(found["lost"]) <= 1
        assert max(found["replayed"]) > 0
        assert found["hashes"] == 1


REFUSALS = {
    "frozen": "linear_fc1.weight is a GroupedTensor, whose bytes are in other tensors",
    "fp32": "is a GroupedTensor, whose bytes are in other tensors; use --use-distributed",
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.proves(f"Transformer Engine, grouped experts, one weight, {kind}", "refused")
        )
        for kind in REFUSALS
    ],
)
def test_a_weight_whose_bytes_are_elsewhere_is_refused(
    notes: list[list[dict[str, Any]]], kind: str, record_property: Callable[[str, object], None]
) -> None:
    for of_rank in notes:
        message = next(n["message"] for n in of_rank if n["event"] == "refused" and n["name"] == kind)
        assert REFUSALS[kind] in message
        record_property("message", message)
