# SPDX-License-Identifier: Apache-2.0
"""The guide to a rank's tensors: under which key, and where in it, a ``torch_dist`` checkpoint has each of them.

Megatron's own ``sharded_state_dict`` of the model is asked once, when the inventory is taken; it holds views of the
live tensors. What its factories make of a parameter (the two halves of a gated layer, one matrix an expert) are views
of that parameter, too: shape, strides and offset are written down. The optimizer's tensors have the keys of the model's
with a prefix, in the format ``fully_reshardable``. Nothing here may stop a run: what cannot be told is named.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import unwrap_model

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore import chain
from megatron_moetion.mcore.disk_format import checkpoint_metadata
from megatron_moetion.mcore.layout import ModelLayout
from megatron_moetion.mcore.offline import require_replayable
from megatron_moetion.mcore.shards import held, shards
from megatron_moetion.mcore.topology import parallel_ranks, parallel_sizes
from megatron_moetion.units import Role

GUIDE_VERSION = 2
_OBJECT_BYTES_MAX = 1 << 16


def guide(
    model: Sequence[DistributedDataParallel],
    layout: ModelLayout,
    optimizer: MegatronOptimizer,
    flags: Mapping[str, Any] | None = None,
) -> str:
    """The guide as JSON. ``problem`` in it says why this state cannot be exported, for a person; None if it can.

    ``flags``: of a loop that has Megatron-LM's, by their names there. What is no plain value of them is left out.
    """
    document: dict[str, Any] = {
        "version": GUIDE_VERSION,
        "sizes": parallel_sizes(),
        "ranks": parallel_ranks(),
        "flags": None if flags is None else {name: value for name, value in flags.items() if _is_plain(value)},
        "problem": None,
    }
    try:
        document |= _placements(model, layout, optimizer)
    except Exception as error:  # a model's own code runs here, and training needs nothing of this
        document["problem"] = f"{type(error).__name__}: {error}"
    return json.dumps(document)


def _placements(
    model: Sequence[DistributedDataParallel], layout: ModelLayout, optimizer: MegatronOptimizer
) -> dict[str, Any]:
    if problem := _problem(optimizer):
        return {"problem": problem}
    links = chain.links(optimizer)
    found = _Sharded(model)
    of_state = [_names_of_state(link.optimizer) for link in links]
    stepped = {id(shard.parameter): where for shard, where in _groups(links)}
    parameters: list[dict[str, Any]] = []
    tensors: dict[str, int] = {}
    for tensor, names, key in (
        *((p, [place.tensor for place in places], id(p)) for p, places in layout.parameters()),
        *((b, [place.tensor], None) for b, place in layout.buffers()),
    ):
        if not tensor.numel():
            continue
        tensors |= dict.fromkeys(names, len(parameters))
        link, group = stepped.get(key, (None, None)) if key is not None else (None, None)
        parameters.append(
            {
                "numel": tensor.numel(),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "link": link,
                "group": group,
                "keys": {} if link is None else _keys(links[link], of_state[link], tensor),
                "views": found.views_of(tensor),
            }
        )
    optimizers = [_kind_of(link) for link in links]
    return {
        "parameters": parameters,
        "tensors": tensors,
        "objects": found.objects,
        "left_out": sorted({*found.left_out, *found.unplaced()}),
        "optimizers": optimizers,
        "replay_problem": _replay_problem(optimizers),
    }


def _replay_problem(optimizers: Sequence[Mapping[str, Any]]) -> str | None:
    """Why logged steps of these could not be repeated on a CPU."""
    try:
        require_replayable(optimizers)
    except ConfigError as error:
        return str(error)
    return None


def _problem(optimizer: MegatronOptimizer) -> str | None:
    """Why a checkpoint of this optimizer has no format that another layout could load."""
    if chain.layer_wise(optimizer):
        return (
            "the optimizer is a LayerWiseDistributedOptimizer, which gives each rank whole parameters: its checkpoints "
            "keep parameter groups by rank, and no other layout has the same"
        )
    whole = [type(o.optimizer).__name__ for o in chain.links(optimizer) if not chain.is_elementwise(o.optimizer)]
    if whole:
        return (
            f"the optimizer has a {whole[0]} outside of a LayerWiseDistributedOptimizer, and no export of one was ever "
            f"compared with a checkpoint of Megatron's"
        )
    return None


def _names_of_state(optimizer: torch.optim.Optimizer) -> dict[Role, str]:
    """What the optimizer calls the state of each role, scales aside."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return {found.role: found.name.partition(".")[0] for p in parameters for found in held(optimizer, p)}


def _keys(link: MegatronOptimizer, names: Mapping[Role, str], parameter: torch.Tensor) -> dict[str, str]:
    """By role, under which key Megatron's checkpoints have a state; main values that are the parameter have none."""
    moments = {role.name: names[role] for role in (Role.EXP_AVG, Role.EXP_AVG_SQ) if role in names}
    if isinstance(link, DistributedOptimizer):
        return {**moments, Role.MASTER.name: "param", Role.REMAINDER.name: "param"}
    if isinstance(link, Float16OptimizerWithFloat16Params) and parameter.dtype is not torch.float32:
        return {**moments, Role.MASTER.name: "fp32_param"}
    return moments


class _Sharded:
    """What Megatron's sharded state dict says of this rank's model."""

    def __init__(self, model: Sequence[DistributedDataParallel]) -> None:
        self.objects: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._views: dict[int, list[ShardedTensor]] = {}
        self._bases: dict[int, torch.Tensor] = {}
        self._seen: set[int] = set()
        metadata = checkpoint_metadata()
        for chunk in model:
            for entry in _values(unwrap_model(chunk).sharded_state_dict(metadata=metadata)):
                if isinstance(entry, ShardedObject):
                    self._note_object(entry)
                elif entry.data.numel():
                    made = list(_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
                    self._views.setdefault(entry.data.data_ptr(), made)
                    self._bases.setdefault(entry.data.data_ptr(), entry.data)

    def views_of(self, tensor: torch.Tensor) -> list[dict[str, Any]]:
        """What a checkpoint has of a tensor; nothing where it has it not."""
        address = tensor.data_ptr()
        self._seen.add(address)
        found = []
        for sharded in self._views.get(address, ()):
            data = sharded.data
            first, rest = divmod(data.data_ptr() - address, tensor.element_size())
            last = first + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))
            if rest or first < 0 or last >= tensor.numel() or data.dtype is not tensor.dtype:
                raise ValueError(f"{sharded.key} is no view of its parameter")
            found.append(
                {
                    "key": sharded.key,
                    "shape": list(data.shape),
                    "strides": list(data.stride()),
                    "first": first,
                    "global_shape": list(sharded.global_shape),
                    "global_offset": list(sharded.global_offset),
                    "fragments": list(sharded.axis_fragmentations) if sharded.axis_fragmentations else None,
                    "prepended": sharded.prepend_axis_num,
                    "may_differ": bool(sharded.allow_shape_mismatch),
                }
            )
        if found and sum(torch.Size(v["shape"]).numel() for v in found) != tensor.numel():
            raise ValueError(f"{found[0]['key']} and its like are not all of their parameter")
        return found

    def unplaced(self) -> list[str]:
        """Keys of tensors that a checkpoint has and that ``views_of`` was not asked for."""
        return [s.key for address, made in self._views.items() if address not in self._seen for s in made]

    def _note_object(self, entry: ShardedObject) -> None:
        """A few bytes beside the tensors: what modules of Transformer Engine keep, empty without FP8."""
        data = entry.data
        if isinstance(data, io.BytesIO):
            kind, content = "stream", data.getvalue()
        elif isinstance(data, torch.Tensor) and data.dtype is torch.uint8 and data.dim() == 1:
            kind, content = "bytes", bytes(data.cpu().tolist())
        elif data is None:
            kind, content = "none", b""
        else:
            self.left_out.append(entry.key)
            return
        if len(content) > _OBJECT_BYTES_MAX:
            self.left_out.append(entry.key)
            return
        self.objects.append(
            {
                "key": entry.key,
                "kind": kind,
                "content": base64.b64encode(content).decode(),
                "global_shape": list(entry.global_shape),
                "global_offset": list(entry.global_offset),
            }
        )


def _values(tree: Any) -> Iterator[Any]:
    """The sharded entries of a state dict, at any depth."""
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _values(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _values(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _groups(links: Sequence[MegatronOptimizer]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Each shard with the numbers of its optimizer and of its parameter group there."""
    for number, link in enumerate(links):
        groups = [g for g, group in enumerate(link.optimizer.param_groups) for _ in group["params"]]
        for shard, group in zip(shards(link), groups, strict=True):
            yield shard, (number, group)


def _kind_of(link: MegatronOptimizer) -> dict[str, Any]:
    """How its checkpoints are, and what a replay of its steps has to know beside the groups' fields."""
    inner = link.optimizer
    return {
        "link": type(link).__name__,
        "name": type(inner).__name__,
        "adam_w_mode": bool(getattr(inner, "adam_w_mode", True)),
    }
