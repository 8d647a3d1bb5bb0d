# SPDX-License-Identifier: Apache-2.0
"""Takes the inventory: every tensor of a rank's training state as regions of units, and the addresses to check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.layout import ModelLayout, Place, dense_unit
from megatron_moetion.mcore.quantised import scaling_tensors
from megatron_moetion.mcore.shards import Shard, held
from megatron_moetion.mcore.tokens import MegatronTokens
from megatron_moetion.units import Region, Role, Unit, UnitKind

Location = tuple[Callable[[], torch.Tensor], Any, int]
"""Looks a tensor up where its owner keeps it; its name there; the address that it had when the inventory was taken."""


@dataclass(frozen=True, kw_only=True)
class StateTensors:
    """The live tensors of a rank's training state. Regions hold addresses only: this keeps the tensors alive."""

    units: tuple[Unit, ...]
    """All units but the host state's."""
    views: tuple[torch.Tensor, ...]
    """Flat views of what the regions cover, gradients left out, in the order of the regions."""
    locations: tuple[Location, ...]

    def moved(self) -> str | None:
        """Which tensor is no longer where it was, for a person; None while all are in place. 0.1 us a tensor."""
        for find, key, address in self.locations:
            try:
                found = find().data_ptr()
            except KeyError:
                found = 0
            if found != address:
                return f"the tensor {key!r} that was at {address:#x} was replaced or moved after attach()"
        return None


def take_inventory(
    *,
    model: Sequence[DistributedDataParallel],
    layout: ModelLayout,
    links: Sequence[MegatronOptimizer],
    shards: Sequence[Shard],
    tokens: MegatronTokens | None,
    with_gradients: bool,
) -> StateTensors:
    """The state of ``model``, of the optimizers ``links`` that hold ``shards`` of it, and the counts of ``tokens``.

    Raises ``UnsupportedState`` for tensors that are not contiguous and for shards of parameters that are not in
    ``model``.
    """
    by_parameter = {id(s.parameter): s for s in shards}
    _require_complete(layout, by_parameter)
    builder = _Builder()
    for parameter, places in layout.parameters():
        shard = by_parameter.get(id(parameter))
        for place in places:
            if place.kind is UnitKind.FROZEN:
                _require_contiguous(parameter, place.tensor)
                builder.add(place, parameter, Role.WEIGHT, 0, (0, parameter.numel()))
        if shard is not None:
            builder.add_shard(places, shard, with_gradients=with_gradients)
    for buffer, place in layout.buffers():
        if buffer.numel():
            _require_contiguous(buffer, place.tensor)
            builder.add(place, buffer, Role.BUFFER, 0, (0, buffer.numel()), at_once=True)
    for block, name, tensor in tokens.buffers() if tokens is not None else ():
        whole = (0, tensor.numel())
        place = Place(
            unit=dense_unit(block), kind=UnitKind.DENSE, tensor=name, start=0, end=tensor.numel(), layer=block.layer
        )
        builder.add(place, tensor, Role.BUFFER, 0, whole, at_once=True)
    locations = [*_optimizer_locations(links), *_module_locations(model, layout)]
    if with_gradients:
        locations.extend(_location(vars(s.parameter), "main_grad") for s in shards)
    return StateTensors(units=builder.units(), views=tuple(builder.views), locations=tuple(locations))


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Where DDP accumulates and reduces a parameter's gradient."""
    found: torch.Tensor = vars(parameter)["main_grad"]
    return found


class _Builder:
    """Regions as they are found, by unit."""

    def __init__(self) -> None:
        self.views: list[torch.Tensor] = []
        self._regions: dict[str, list[Region]] = {}
        self._places: dict[str, Place] = {}

    def add(
        self,
        place: Place,
        tensor: torch.Tensor,
        role: Role,
        first: int,
        span: tuple[int, int],
        *,
        at_once: bool = False,
        together: str = "",
    ) -> None:
        """Elements [start, end) of a parameter; ``tensor`` begins at element ``first``."""
        start, end = span
        size = tensor.element_size()
        if role is not Role.GRAD:
            self.views.append(tensor.detach().reshape(-1)[start - first : end - first])
        self._places.setdefault(place.unit, place)
        self._regions.setdefault(place.unit, []).append(
            Region(
                unit=place.unit,
                tensor=place.tensor,
                role=role,
                dtype=str(tensor.dtype).removeprefix("torch."),
                start=start,
                nbytes=(end - start) * size,
                address=tensor.data_ptr() + (start - first) * size,
                device=str(tensor.device),
                at_once=at_once,
                together=together,
            )
        )

    def add_shard(self, places: Sequence[Place], shard: Shard, *, with_gradients: bool) -> None:
        """What of a shard lies in each place. Its scales go with the first one."""
        spans = [(place, max(place.start, shard.start), min(place.end, shard.end)) for place in places]
        inside = [(place, start, end) for place, start, end in spans if start < end]
        together = f"{inside[0][0].tensor}+{shard.start}" if shard.scales or shard.is_whole else ""
        for place, start, end in inside:
            for role, tensor in shard.tensors.items():
                self.add(place, tensor, role, shard.start, (start, end), together=together)
            if with_gradients:
                gradient = gradient_of(shard.parameter)
                _require_contiguous(gradient, place.tensor)
                self.add(place, gradient, Role.GRAD, 0, (start, end), at_once=True, together=together)
        for name, scale in shard.scales.items():
            place, start, _ = inside[0]
            named = replace(place, tensor=f"{place.tensor}.{name}")
            self.add(named, scale, Role.SCALE, start, (start, start + 1), together=together)

    def units(self) -> tuple[Unit, ...]:
        """In the order in which they were found."""
        return tuple(
            Unit(name=name, kind=place.kind, regions=tuple(self._regions[name]), layer=place.layer, expert=place.expert)
            for name, place in self._places.items()
        )


def _require_complete(layout: ModelLayout, shards: Mapping[int, Shard]) -> None:
    known = {id(parameter) for parameter, _ in layout.parameters()}
    foreign = sum(parameter not in known for parameter in shards)
    if foreign:
        raise UnsupportedState(
            f"the optimizer holds {foreign} parameter(s) that the given model chunks do not contain; "
            f"pass all chunks to attach()"
        )


def _require_contiguous(tensor: torch.Tensor, name: str) -> None:
    if tensor.numel() and not tensor.data_ptr():
        raise UnsupportedState(
            f"{name} is a {type(tensor).__name__}, whose bytes are in other tensors: MoEtion captures such a parameter "
            f"by its main values only, so it may not be frozen"
        )
    if not tensor.is_contiguous():
        raise UnsupportedState(
            f"{name} is not contiguous (strides {tensor.stride()}) and cannot be captured as one span"
        )


def _optimizer_locations(links: Sequence[MegatronOptimizer]) -> Iterator[Location]:
    for link in links:
        for group in link.optimizer.param_groups:
            for position, main in enumerate(group["params"]):
                yield _location(group["params"], position)
                for found in held(link.optimizer, main):
                    yield found.find, found.name, found.find().data_ptr()


def _module_locations(model: Sequence[nn.Module], layout: ModelLayout) -> Iterator[Location]:
    captured = {id(buffer) for buffer, _ in layout.buffers()}
    for module in (m for chunk in model for m in chunk.modules()):
        for name, tensor in module._buffers.items():
            if tensor is not None and id(tensor) in captured:
                yield _location(module._buffers, name)
        for holder, key, _ in scaling_tensors(module):
            yield _location(holder, key)
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield _location(module._parameters, name)


def _location(holder: Any, key: Any) -> Location:
    return lambda: holder[key], key, holder[key].data_ptr()
