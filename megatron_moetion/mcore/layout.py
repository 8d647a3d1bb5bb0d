# SPDX-License-Identifier: Apache-2.0
"""Which unit each parameter and buffer of a Megatron-Core GPT belongs to. Global layer and expert numbers from 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.quantised import scaling_tensors
from megatron_moetion.units import UnitKind

_SEQUENTIAL = re.compile(r"local_experts\.(\d+)\.(.+)")
_NUMBERED = re.compile(r"(linear_fc\d\.(?:weight|bias))(\d+)")
_GROUPED = re.compile(r"weight[12]")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A span of a parameter, in elements of the flattened parameter, and the unit that it belongs to."""

    unit: str
    kind: UnitKind
    tensor: str
    start: int
    end: int
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class MoeBlock:
    """One MoE layer of this rank and the global numbers of its local experts."""

    layer: int
    prefix: str
    module: MoELayer
    experts: tuple[int, ...]

    def expert_unit(self, expert: int) -> str:
        """Name of the unit of one expert."""
        return f"{self.prefix}.experts.{expert}"


@dataclass(frozen=True, kw_only=True)
class _Scope:
    path: str
    prefix: str
    layer: int | None
    block: MoeBlock | None = None


class ModelLayout:
    """Names and places of everything in this rank's model chunks (unwrapped ``GPTModel`` modules)."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = tuple(chunks)
        self._scopes = [_scopes(chunk) for chunk in chunks]

    @property
    def blocks(self) -> tuple[MoeBlock, ...]:
        """This rank's MoE layers, in order."""
        return tuple(s.block for scopes in self._scopes for s in scopes if s.block is not None)

    def parameters(self) -> Iterator[tuple[nn.Parameter, tuple[Place, ...]]]:
        """Each distinct parameter once, with the places that tile it."""
        seen: set[int] = set()
        for chunk, scopes in zip(self._chunks, self._scopes, strict=True):
            for name, parameter in chunk.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter, _places(name, parameter, scopes)

    def buffers(self) -> Iterator[tuple[torch.Tensor, Place]]:
        """Buffers that are training state: all persistent ones, all of the routers', and scales of delayed scaling."""
        for chunk, scopes in zip(self._chunks, self._scopes, strict=True):
            for path, module in chunk.named_modules():
                for name, buffer in (
                    *module.named_buffers(recurse=False),
                    *((name, holder[key]) for holder, key, name in scaling_tensors(module)),
                ):
                    if name in module._non_persistent_buffers_set and not isinstance(module, TopKRouter):
                        continue
                    full = f"{path}.{name}" if path else name
                    scope, rest = _scope_of(full, scopes)
                    tensor = f"{scope.prefix}.{rest}"
                    unit = _dense_unit(scope)
                    place = Place(
                        unit=unit, kind=UnitKind.DENSE, tensor=tensor, start=0, end=buffer.numel(), layer=scope.layer
                    )
                    yield buffer, place


def dense_unit(block: MoeBlock) -> str:
    """Name of the dense unit of an MoE layer."""
    return f"{block.prefix}.dense"


def _scopes(chunk: nn.Module) -> list[_Scope]:
    """Layers and their MoE parts, the longest path first; the last scope is the whole chunk."""
    scopes = [_Scope(path="", prefix="", layer=None)]
    layers: dict[str, tuple[str, int]] = {}
    for path, module in chunk.named_modules():
        if isinstance(module, MultiTokenPredictionLayer):
            layers[path] = (f"mtp.{module.layer_number - 1}", module.layer_number - 1)
            scopes.append(_Scope(path=path, prefix=layers[path][0], layer=layers[path][1]))
        elif isinstance(module, BaseTransformerLayer) and not any(path.startswith(p + ".") for p in layers):
            layers[path] = (f"layers.{module.layer_number - 1}", module.layer_number - 1)
            scopes.append(_Scope(path=path, prefix=layers[path][0], layer=layers[path][1]))
    for path, module in chunk.named_modules():
        if isinstance(module, MoELayer):
            owner = max((p for p in layers if path.startswith(p + ".")), key=len)
            prefix, layer = layers[owner]
            block = MoeBlock(
                layer=layer, prefix=prefix, module=module, experts=tuple(int(e) for e in module.local_expert_indices)
            )
            scopes.append(_Scope(path=f"{path}.experts", prefix=prefix, layer=layer, block=block))
    return sorted(scopes, key=lambda s: -len(s.path))


def _scope_of(name: str, scopes: Sequence[_Scope]) -> tuple[_Scope, str]:
    scope = next(s for s in scopes if not s.path or name.startswith(s.path + "."))
    return scope, name[len(scope.path) + 1 :] if scope.path else name


def _dense_unit(scope: _Scope) -> str:
    return f"{scope.prefix}.dense"


def _places(name: str, parameter: nn.Parameter, scopes: Sequence[_Scope]) -> tuple[Place, ...]:
    scope, rest = _scope_of(name, scopes)
    whole = {"start": 0, "end": parameter.numel()}
    if not parameter.requires_grad:
        unit = f"{scope.prefix or _outer_unit(rest)}.frozen"
        tensor = f"{scope.prefix}.{rest}" if scope.prefix else rest
        return (Place(unit=unit, kind=UnitKind.FROZEN, tensor=tensor, layer=scope.layer, **whole),)
    if not scope.path:
        return (Place(unit=_outer_unit(rest), kind=UnitKind.DENSE, tensor=rest, **whole),)
    if scope.block is None:
        return (
            Place(
                unit=_dense_unit(scope),
                kind=UnitKind.DENSE,
                tensor=f"{scope.prefix}.{rest}",
                layer=scope.layer,
                **whole,
            ),
        )
    return _expert_places(scope.block, rest, parameter)


def _outer_unit(name: str) -> str:
    """Unit of a parameter outside the layers: the embedding, else the output head with the final norm."""
    return "embedding" if name.startswith("embedding.") else "head"


def _expert_places(block: MoeBlock, rest: str, parameter: nn.Parameter) -> tuple[Place, ...]:
    if match := _SEQUENTIAL.fullmatch(rest):
        return (_expert_place(block, int(match[1]), match[2], 0, parameter.numel()),)
    if match := _NUMBERED.fullmatch(rest):
        return (_expert_place(block, int(match[2]), match[1], 0, parameter.numel()),)
    if _GROUPED.fullmatch(rest):  # one weight for all local experts, expert after expert when flattened
        each, left = divmod(parameter.numel(), len(block.experts))
        assert left == 0, f"{block.prefix} {rest}: {parameter.numel()} elements for {len(block.experts)} experts"
        return tuple(
            _expert_place(block, local, rest, local * each, (local + 1) * each) for local in range(len(block.experts))
        )
    raise UnsupportedState(
        f"{block.prefix}: the parameter {rest!r} of {type(block.module.experts).__name__} belongs to no single expert "
        f"that MoEtion knows of; supported are SequentialMLP, GroupedMLP and TEGroupedMLP"
    )


def _expert_place(block: MoeBlock, local: int, tensor: str, start: int, end: int) -> Place:
    expert = block.experts[local]
    unit = block.expert_unit(expert)
    return Place(
        unit=unit,
        kind=UnitKind.EXPERT,
        tensor=f"{unit}.{tensor}",
        start=start,
        end=end,
        layer=block.layer,
        expert=expert,
    )
