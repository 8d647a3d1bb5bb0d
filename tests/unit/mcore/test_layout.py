# SPDX-License-Identifier: Apache-2.0
"""Names and spans of expert parameters, for every kind of expert module of Megatron-Core.

Whole models are in ``tests/dist/test_inventory.py``; grouped experts need a GPU there, so their names are held here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.layout import MoeBlock, _expert_places, dense_unit
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
