# SPDX-License-Identifier: Apache-2.0
"""Real Megatron-Core on four ranks: models of other layers than a GPT's, and experts in weights of their own kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import Nursery

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

MIXED = "pp2 ep2, Mamba, attention, MLP and MoE"
SHARED = "ep2 dp2, a shared expert"
GROUPED = "ep2 dp2, GroupedMLP"
PATTERNS = {MIXED: "M*E-ME*E", SHARED: "*EME"}
"""As in ``megatron_layouts.py``."""
TENSORS = {
    "M": {"mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.A_log", "mixer.D", "norm.weight", "norm.bias"},
    "*": {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", "input_layernorm.weight"},
    "-": {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "pre_mlp_layernorm.weight"},
    "E": {"mlp.router.weight", "pre_mlp_layernorm.weight"},
}
"""What the dense unit of a layer holds at least."""
CASES = [
    pytest.param(MIXED, marks=pytest.mark.proves("HybridModel or MambaModel", "recovery")),
    pytest.param(SHARED, marks=pytest.mark.proves("HybridModel or MambaModel, shared experts", "recovery")),
    pytest.param(GROUPED, marks=pytest.mark.proves("Grouped experts in two weights (GroupedMLP)", "recovery")),
]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank noted; all cases run in one launch, because Megatron-Core takes seconds to import."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    with Nursery("layouts") as nursery:
        return nursery.notes(180, folder)


@pytest.fixture
def ranks(notes: list[list[dict[str, Any]]], case: str) -> list[dict[str, Any]]:
    """The ranks' findings in one case."""
    found = [n for of_rank in notes for n in of_rank if n.get("name") == case]
    if case == GROUPED and not found:
        pytest.skip("this megatron-core has no GroupedMLP")
    assert len(found) == 4
    return found


@pytest.mark.parametrize("case", CASES)
def test_all_state_is_captured_once_and_restored_bitwise_and_so_is_the_next_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["owned"] > 50_000
        assert (found["missed"], found["twice"], found["of_others"]) == (0, 0, 0)
        assert found["moved"] is None
        assert found["scrambled"] == []
        assert found["not_restored"] == []
        assert found["step_again"] == found["step"]
        assert not found["step"]["skipped"]
        assert found["differs_after_step"] == []
        assert found["counts"] > 0
    assert any("lm loss" in found["step"]["losses"] for found in ranks)


@pytest.mark.parametrize("case", CASES)
def test_the_unit_of_an_expert_holds_that_expert(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["mislabelled"] == []
    _, _, experts, replicas = ranks[0]["elements"]
    assert sum(found["marked"] for found in ranks) == sum(f["elements"][2] for f in ranks) / replicas
    assert experts > 0


@pytest.mark.parametrize("case", PATTERNS)
def test_every_layer_is_a_unit_of_its_own_by_its_place_in_the_whole_model(ranks: list[dict[str, Any]]) -> None:
    pattern = PATTERNS[str(ranks[0]["name"])]
    tensors: dict[str, set[str]] = {}
    for found in ranks:
        for name, (layer, of_unit) in found["units"].items():
            assert layer is None or name.startswith(f"layers.{layer}."), name
            tensors.setdefault(name, set()).update(of_unit)
    for layer, kind in enumerate(pattern):
        found = {t.removeprefix(f"layers.{layer}.") for t in tensors.pop(f"layers.{layer}.dense")}
        assert TENSORS[kind] <= found
        assert not any(TENSORS[other] & found for other in TENSORS if other not in (kind, "-", "E"))
    experts = {f"layers.{layer}.experts.{e}" for layer, kind in enumerate(pattern) if kind == "E" for e in range(4)}
    assert set(tensors) == experts | {"embedding", "head", "host"}
    last = {"decoder.final_norm.weight", "decoder.final_norm.bias"}
    assert last <= tensors["head"] <= last | {"output_layer.weight"}
    assert tensors["embedding"] == {"embedding.word_embeddings.weight"}


@pytest.mark.proves("HybridModel or MambaModel, mode exact", "recovery")
def test_mode_exact_loses_at_most_an_iteration_and_no_bit(notes: list[list[dict[str, Any]]]) -> None:
    for of_rank in notes:
        found = next(n for n in of_rank if n["event"] == "exact")
        assert found["wrong"] == [], (found["wrong"], found["lost"])
        assert len(found["lost"]) == 3
        assert max(found["lost"]) <= 1
        assert max(found["replayed"]) > 0
        assert found["hashes"] == 1
