# SPDX-License-Identifier: Apache-2.0
"""Whether a unit holds the expert that it is named after, by what the modules of Megatron-Core take for that expert."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_moetion.units import Inventory, Role, UnitKind


def mislabelled(model: Sequence[torch.nn.Module], optimizer: Any, inventory: Inventory) -> tuple[int, list[str]]:
    """Writes its number into every expert; how many main values follow, and which units have other ones.

    Training cannot go on from there.
    """
    with torch.no_grad():
        for module in (m for chunk in model for m in chunk.modules() if isinstance(m, MoELayer)):
            for local, expert in enumerate(module.local_expert_indices):
                for tensor in _of_expert(module.experts, local):
                    tensor.fill_(_mark(module.layer_number - 1, expert))
    optimizer.reload_model_params()
    elements, wrong = 0, []
    for number in inventory.of_kind(UnitKind.EXPERT):
        unit = inventory.units[number]
        for region in (r for r in unit.regions if r.role is Role.MASTER):
            found = np.frombuffer(ctypes.string_at(region.address, region.nbytes), dtype=np.float32)
            elements += found.size
            if (
                unit.name != f"layers.{unit.layer}.experts.{unit.expert}"
                or (found != _mark(unit.layer, unit.expert)).any()
            ):
                wrong.append(f"{region.tensor} of {unit.name}: {np.unique(found)[:4]}")
    return elements, wrong


def _mark(layer: int | None, expert: int | None) -> float:
    """A small whole number, which every floating-point format has."""
    assert layer is not None
    assert expert is not None
    assert expert < 16
    return float(16 * layer + expert + 1)


def _of_expert(experts: torch.nn.Module, local: int) -> Iterator[torch.Tensor]:
    """All parameters of one local expert, as the forward pass takes them."""
    kind = type(experts).__name__
    if kind == "SequentialMLP":
        yield from experts.local_experts[local].parameters()
    elif kind == "GroupedMLP":
        yield experts.weight1.view(experts.num_local_experts, experts.config.hidden_size, -1)[local]
        yield experts.weight2.view(experts.num_local_experts, -1, experts.config.hidden_size)[local]
    else:
        for linear in (experts.linear_fc1, experts.linear_fc2):
            for name in ("weight", "bias") if linear.use_bias else ("weight",):
                if getattr(linear, f"single_grouped_{name}"):
                    yield getattr(linear, name).split_into_quantized_tensors()[local]
                else:
                    yield getattr(linear, f"{name}{local}")
