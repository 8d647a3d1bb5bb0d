# SPDX-License-Identifier: Apache-2.0
"""Quantised parameters without Transformer Engine: its classes are known by their names."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.inventory import _module_locations
from megatron_moetion.mcore.layout import ModelLayout
from megatron_moetion.mcore.quantised import (
    create_scaling_state,
    payload,
    quantised_class,
    refuse_parameters,
    scaling_tensors,
)


class MXFP8Tensor(nn.Parameter):
    """A stand-in for the tensor of that name."""

    __module__ = "transformer_engine.pytorch.tensor.mxfp8_tensor"


class Float8Tensor(nn.Parameter):
    """The same."""

    __module__ = "transformer_engine.pytorch.tensor.float8_tensor"


class GroupedTensor(nn.Parameter):
    """The same."""

    __module__ = "transformer_engine.pytorch.tensor.grouped_tensor"


class DTensor(nn.Parameter):
    """The same."""


class NVFP4Tensor(nn.Parameter):
    """The same."""

    __module__ = "transformer_engine.pytorch.tensor.nvfp4_tensor"


OwnTensor = type("MXFP8Tensor", (nn.Parameter,), {"__module__": "somewhere.else"})
"""One that has only the name."""


ADAM: Any = FP32Optimizer.__new__(FP32Optimizer)


def chunk(parameter: nn.Parameter, *, sharded: bool = True, gathers: bool = True) -> Any:
    """A model of one parameter."""
    module = nn.Module()
    module.register_parameter("weight", parameter)
    module.ddp_config = SimpleNamespace(use_distributed_optimizer=sharded, fp8_param_gather=gathers)
    return module


def test_classes_are_told_apart_by_name_and_package() -> None:
    plain = torch.zeros(4)
    assert quantised_class(nn.Parameter(plain)) is None
    assert quantised_class(MXFP8Tensor(plain)) == "MXFP8Tensor"
    grouped = GroupedTensor(plain)
    assert quantised_class(grouped) is None
    grouped.rowwise_data = plain
    assert quantised_class(grouped) is None
    grouped.rowwise_data = plain.to(torch.uint8)
    assert quantised_class(grouped) == "GroupedTensor"
    grouped.rowwise_data, grouped.columnwise_data = None, plain.to(torch.uint8)
    assert quantised_class(grouped) == "GroupedTensor"


@pytest.mark.parametrize("cls", [NVFP4Tensor, DTensor, OwnTensor])
def test_tensors_that_are_not_known_are_refused_by_name(cls: type[nn.Parameter]) -> None:
    with pytest.raises(UnsupportedState, match=f"a parameter is a {cls.__name__} of {cls.__module__}, which"):
        refuse_parameters([chunk(cls(torch.zeros(4)))], ADAM)


def test_frozen_and_ungathered_quantised_parameters_are_refused() -> None:
    known = [chunk(MXFP8Tensor(torch.zeros(4))), chunk(nn.Parameter(torch.zeros(4), requires_grad=False))]
    refuse_parameters(known, ADAM)
    frozen = MXFP8Tensor(torch.zeros(4))
    frozen.requires_grad_(False)
    with pytest.raises(UnsupportedState, match="weight is a frozen MXFP8Tensor"):
        refuse_parameters([chunk(frozen)], ADAM)
    for how in ({"sharded": False}, {"gathers": False}):
        with pytest.raises(UnsupportedState, match="weight is a Float8Tensor and --fp8-param-gather"):
            refuse_parameters([chunk(Float8Tensor(torch.zeros(4)), **how)], ADAM)


@pytest.mark.proves("Quantised parameters with Muon (LayerWiseDistributedOptimizer)", "refused")
def test_quantised_parameters_beside_a_layer_wise_optimizer_are_refused(
    record_property: Callable[[str, object], None],
) -> None:
    layers, outer = (kind.__new__(kind) for kind in (LayerWiseDistributedOptimizer, ChainedOptimizer))
    layers.chained_optimizers, outer.chained_optimizers = [], [layers]
    refuse_parameters([chunk(nn.Parameter(torch.zeros(4)))], outer)
    with pytest.raises(UnsupportedState, match=r"weight is a MXFP8Tensor and .* LayerWise.*--optimizer adam") as error:
        refuse_parameters([chunk(MXFP8Tensor(torch.zeros(4)))], outer)
    record_property("message", str(error.value))


def test_a_payload_is_bytes_and_scales_without_padding_and_stale_transposes() -> None:
    block = MXFP8Tensor(torch.zeros(64, 96))
    block._rowwise_data = torch.zeros(64, 96, dtype=torch.uint8)
    block._rowwise_scale_inv = torch.zeros(128, 4, dtype=torch.uint8)
    block._columnwise_scale_inv = torch.zeros(4, 128, dtype=torch.uint8)
    assert {name: tuple(t.shape) for name, t in payload(block).items()} == {
        "_rowwise_data": (64, 96),
        "_rowwise_scale_inv": (64, 3),
        "_columnwise_scale_inv": (2, 96),
    }
    tensor = Float8Tensor(torch.zeros(4, 4))
    tensor._data, tensor._scale_inv, tensor._transpose = torch.zeros(4, 4), torch.ones(1), torch.zeros(4, 4)
    assert sorted(payload(tensor)) == ["_data", "_scale_inv"]
    tensor._transpose_invalid = False
    assert sorted(payload(tensor)) == ["_data", "_scale_inv", "_transpose"]


class Linear(nn.Module):
    """A module with scales, as Transformer Engine's has them once it knows how many products it computes."""

    __module__ = "transformer_engine.pytorch.module.linear"

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"recipe": object()}

    def init_fp8_metadata(self, num_gemms: int) -> None:
        for direction, each in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[direction] = SimpleNamespace(
                scale=torch.ones(each * num_gemms), amax_history=torch.zeros(4, each * num_gemms)
            )


class GroupedLinear(Linear):
    """One for each expert of a layer."""

    __module__ = "transformer_engine.pytorch.module.grouped_linear"
    num_gemms = 5


class DotProductAttention(Linear):
    """Quantises only where a setting that is refused says so."""

    __module__ = "transformer_engine.pytorch.attention"


class Unheard(nn.Module):
    """A module that nobody knows."""

    __module__ = "transformer_engine.pytorch.module.unheard"

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}


def test_scales_exist_before_the_first_forward_and_are_captured_and_watched() -> None:
    model = nn.Module()
    model.dense, model.experts, model.attention = Linear(), GroupedLinear(), DotProductAttention()
    config = SimpleNamespace(fp8=None)
    create_scaling_state([model], config)  # type: ignore[list-item]
    layout = ModelLayout([model])
    found = {place.tensor.removeprefix("."): tuple(buffer.shape) for buffer, place in layout.buffers()}
    assert found == {
        "dense.scaling_fwd.scale": (3,),
        "dense.scaling_fwd.amax_history": (4, 3),
        "dense.scaling_bwd.scale": (2,),
        "dense.scaling_bwd.amax_history": (4, 2),
        "experts.scaling_fwd.scale": (15,),
        "experts.scaling_fwd.amax_history": (4, 15),
        "experts.scaling_bwd.scale": (10,),
        "experts.scaling_bwd.amax_history": (4, 10),
    }
    locations = list(_module_locations([model], layout))
    assert len(locations) == 8
    find, name, address = locations[0]
    assert name == "scale"
    assert find().data_ptr() == address
    model.dense.fp8_meta["scaling_fwd"].scale = torch.ones(3)
    assert find().data_ptr() != address


def test_modules_of_other_recipes_have_no_scales() -> None:
    module = Linear()
    assert list(scaling_tensors(module)) == []
    module.fp8_meta["scaling_fwd"] = SimpleNamespace(recipe=object())
    assert list(scaling_tensors(module)) == []
    assert list(scaling_tensors(nn.Linear(2, 2))) == []


def test_a_module_whose_scales_cannot_be_found_is_refused() -> None:
    model = nn.Module()
    model.odd = Unheard()
    with pytest.raises(UnsupportedState, match="odd is a Unheard"):
        create_scaling_state([model], SimpleNamespace(fp8=None))  # type: ignore[list-item]
    model.odd = type("Linear", (Unheard,), {"__module__": "somewhere.else"})()
    with pytest.raises(UnsupportedState, match="odd is a Linear, whose scales"):
        create_scaling_state([model], SimpleNamespace(fp8=None))  # type: ignore[list-item]
