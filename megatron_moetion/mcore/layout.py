# SPDX-License-Identifier: Apache-2.0
"""Which unit each parameter and buffer of a Megatron-Core GPT belongs to. Global layer and expert numbers from 0."""

from __future__ import annotations

import re
from collections import Counter
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
_SINGLE = re.compile(r"linear_fc\d\.(weight|bias)")
_SINGLE_NDIM = {"weight": 3, "bias": 2}
"""The first dimension is the expert. Without it a weight would be one that all experts share."""


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
        names = Counter(s.prefix for scopes in self._scopes for s in scopes if s.block is None and s.prefix)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise UnsupportedState(
                f"several layers of this rank are called {', '.join(twice)}: their layer_number is not the global one"
            )

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
    layers = list(_layers(chunk))
    blocks: dict[str, _Scope] = {}
    for path, module in chunk.named_modules():
        if isinstance(module, MoELayer):
            owner = max((s for s in layers if path.startswith(s.path + ".")), key=lambda s: len(s.path), default=None)
            if owner is None or owner.layer is None or owner.prefix in blocks:
                where = "in no layer of the model" if owner is None else f"not the only one of {owner.prefix}"
                raise UnsupportedState(
                    f"the MoE block {path} is {where}: experts are told apart by the number of their layer"
                )
            block = MoeBlock(
                layer=owner.layer,
                prefix=owner.prefix,
                module=module,
                experts=tuple(int(e) for e in module.local_expert_indices),
            )
            blocks[owner.prefix] = _Scope(path=f"{path}.experts", prefix=owner.prefix, layer=owner.layer, block=block)
    return sorted((*layers, *blocks.values(), _Scope(path="", prefix="", layer=None)), key=lambda s: -len(s.path))


def _layers(module: nn.Module, path: str = "", mtp: _Scope | None = None) -> Iterator[_Scope]:
    """The layers below ``module``: outermost entries of lists of modules, whatever they are, and transformer layers.

    Megatron-Core's attention, MoE, Mamba and other layers have no class in common, but each list of them is a
    ``ModuleList``, and each knows its global number. One that does not is numbered by its place in the list.
    ``mtp`` is the multi-token prediction layer that ``module`` is a part of.
    """
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, MultiTokenPredictionLayer):
            scope = _Scope(path=here, prefix=f"mtp.{child.layer_number - 1}", layer=child.layer_number - 1)
            yield scope
            yield from _layers(child, here, scope)
        elif isinstance(module, nn.ModuleList):
            if mtp is not None:  # one of several layers that predict the same token
                yield _Scope(path=here, prefix=f"{mtp.prefix}.layers.{name}", layer=mtp.layer)
            else:
                yield _layer(here, getattr(child, "layer_number", None) or int(name) + 1)
        elif isinstance(child, BaseTransformerLayer):
            if mtp is None:
                yield _layer(here, child.layer_number)
        else:
            yield from _layers(child, here, mtp)


def _layer(path: str, number: int) -> _Scope:
    """The scope of a layer, named after the list that it is in, if that is not the decoder's: ``number`` is from 1."""
    stack = path.rpartition(".")[0].removeprefix("decoder.") or "layers"
    return _Scope(path=path, prefix=f"{stack}.{number - 1}", layer=number - 1)


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
    if _is_grouped(rest, parameter, len(block.experts)):  # expert after expert when flattened
        each = parameter.numel() // len(block.experts)
        return tuple(
            _expert_place(block, local, rest, local * each, (local + 1) * each) for local in range(len(block.experts))
        )
    raise UnsupportedState(
        f"{block.prefix}: the parameter {rest!r} of {type(block.module.experts).__name__} belongs to no single expert "
        f"that MoEtion knows of; supported are SequentialMLP, GroupedMLP and TEGroupedMLP"
    )


def _is_grouped(name: str, parameter: nn.Parameter, experts: int) -> bool:
    """Whether it holds the same number of elements of each local expert, one expert after the other.

    So does ``GroupedMLP`` (``weight1``, ``weight2``, whatever shapes they have), which views each as one matrix an
    expert, and a ``GroupedLinear`` of Transformer Engine with ``single_grouped_weight`` or ``single_grouped_bias``.
    """
    if _GROUPED.fullmatch(name):
        return parameter.numel() % experts == 0
    match = _SINGLE.fullmatch(name)
    return match is not None and parameter.ndim >= _SINGLE_NDIM[match[1]] and parameter.shape[0] == experts


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
