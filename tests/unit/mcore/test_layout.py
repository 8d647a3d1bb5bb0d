# SPDX-License-Identifier: Apache-2.0
"""Names of layers of every kind, and names and spans of expert parameters for every kind of expert module.

Whole models are in ``tests/dist`` (``test_inventory.py``, ``test_layouts.py``), Transformer Engine in ``tests/te``.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.layout import ModelLayout, MoeBlock, _expert_places, dense_unit
from megatron_moetion.units import UnitKind

BLOCK = MoeBlock(
    layer=3, prefix="layers.3", module=cast(Any, SimpleNamespace(experts=nn.Identity())), experts=(8, 9, 10, 11)
)


def places(name: str, numel: int = 40) -> list[tuple[str, str, int, int]]:
    found = _expert_places(BLOCK, name, nn.Parameter(torch.zeros(numel)))
    assert all(p.kind is UnitKind.EXPERT and p.layer == 3 and p.unit.endswith(str(p.expert)) for p in found)
    return [(p.unit, p.tensor, p.start, p.end) for p in found]


def test_sequential_experts_have_modules_of_their_own() -> None:
    assert places("local_experts.2.linear_fc1.weight") == [
        ("layers.3.experts.10", "layers.3.experts.10.linear_fc1.weight", 0, 40)
    ]


def test_transformer_engine_numbers_the_weights() -> None:
    assert places("linear_fc2.weight1") == [("layers.3.experts.9", "layers.3.experts.9.linear_fc2.weight", 0, 40)]
    assert places("linear_fc1.bias3") == [("layers.3.experts.11", "layers.3.experts.11.linear_fc1.bias", 0, 40)]


@pytest.mark.parametrize("name", ["weight1", "weight2"])
def test_an_expert_is_a_slice_of_grouped_weights(name: str) -> None:
    assert places(name) == [
        (f"layers.3.experts.{e}", f"layers.3.experts.{e}.{name}", 10 * i, 10 * (i + 1))
        for i, e in enumerate(BLOCK.experts)
    ]


def test_what_belongs_to_no_expert_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedState, match=r"layers\.3: the parameter 'lora_a' of Identity"):
        places("lora_a")


def test_the_dense_unit_is_named_after_the_layer() -> None:
    assert dense_unit(BLOCK) == "layers.3.dense"


# -- Transformer Engine's weights for all local experts -----------------------------------------------------------


def grouped(name: str, *shape: int) -> list[tuple[str, str, int, int]]:
    found = _expert_places(BLOCK, name, nn.Parameter(torch.zeros(shape)))
    return [(p.unit, p.tensor, p.start, p.end) for p in found]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear_fc1.weight", (4, 5, 2)), ("linear_fc2.bias", (4, 10)), ("linear_fc1.bias", (4, 1, 10))],
)
def test_an_expert_is_an_entry_of_the_one_weight_of_a_grouped_linear(name: str, shape: tuple[int, ...]) -> None:
    assert grouped(name, *shape) == [
        (f"layers.3.experts.{e}", f"layers.3.experts.{e}.{name}", 10 * i, 10 * (i + 1))
        for i, e in enumerate(BLOCK.experts)
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear_fc1.weight", (4, 10)), ("linear_fc1.weight", (2, 4, 5)), ("linear_fc2.bias", (4,)), ("weight1", (6, 7))],
)
def test_a_weight_that_is_not_an_equal_part_for_each_expert_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedState, match=re.escape(f"the parameter {name!r}")):
        grouped(name, *shape)


# -- layers -------------------------------------------------------------------------------------------------------


def layer(number: int | None = None, kind: type[nn.Module] = nn.Module, **parts: nn.Module) -> nn.Module:
    """Of any kind, without what its own constructor would make; one weight, and ``parts``."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    if number is not None:
        made.layer_number = number
    made.weight = nn.Parameter(torch.zeros(2))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def moe(*experts: int) -> nn.Module:
    found = layer(None, MoELayer, experts=layer(local_experts=nn.ModuleList(layer() for _ in experts)))
    del found.weight, found.experts.weight
    found.local_expert_indices = list(experts)
    return found


def stack(*layers: nn.Module) -> nn.Module:
    return layer(layers=nn.ModuleList(layers))


def units(*chunks: nn.Module) -> dict[str, int | None]:
    """Layer of each unit."""
    return {p.unit: p.layer for _, places in ModelLayout(chunks).parameters() for p in places}


def test_a_layer_of_any_kind_is_a_unit_by_its_global_number() -> None:
    mixer = layer(5)  # as of MambaLayer, which is no transformer layer: its mixer knows the layer's number, too
    assert units(layer(decoder=stack(layer(5, mixer=mixer), layer(6, TransformerLayer, mlp=moe(2, 3))))) == {
        "layers.4.dense": 4,
        "layers.5.dense": 5,
        "layers.5.experts.2": 5,
        "layers.5.experts.3": 5,
        "head": None,
    }


def test_layers_of_two_stacks_have_names_of_their_own() -> None:
    tower = layer(blocks=nn.ModuleList([layer(), layer()]))
    both = layer(encoder=stack(layer(1, TransformerLayer)), decoder=stack(layer(1, TransformerLayer)), tower=tower)
    assert set(units(both)) == {
        "encoder.layers.0.dense", "layers.0.dense", "tower.blocks.0.dense", "tower.blocks.1.dense", "head",
    }  # fmt: skip


def test_layers_that_predict_one_token_together_are_units_of_their_own() -> None:
    several = layer(2, MultiTokenPredictionLayer, mtp_model_layer=stack(layer(1), layer(2, mlp=moe(0))))
    assert units(layer(mtp=stack(several))) == {
        "mtp.1.dense": 1, "mtp.1.layers.0.dense": 1, "mtp.1.layers.1.dense": 1, "mtp.1.layers.1.experts.0": 1,
        "head": None,
    }  # fmt: skip
    one = layer(1, MultiTokenPredictionLayer, transformer_layer=layer(1, TransformerLayer, mlp=moe(0)))
    assert units(layer(mtp=stack(one))) == {"mtp.0.dense": 0, "mtp.0.experts.0": 0, "head": None}


def test_layers_with_the_same_number_are_refused() -> None:
    with pytest.raises(UnsupportedState, match=r"several layers of this rank are called layers\.1:"):
        units(layer(decoder=stack(layer(2))), layer(decoder=stack(layer(2, TransformerLayer))))


def test_experts_that_no_layer_tells_apart_are_refused() -> None:
    with pytest.raises(UnsupportedState, match=r"the MoE block mlp is in no layer of the model"):
        units(layer(mlp=moe(0)))
    with pytest.raises(UnsupportedState, match=r"the MoE block decoder\.layers\.0\.b is not the only one of layers\.2"):
        units(layer(decoder=stack(layer(3, a=moe(0), b=moe(0)))))
