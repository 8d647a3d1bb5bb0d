# SPDX-License-Identifier: Apache-2.0
"""Writes a ``torch_dist`` checkpoint from tensors and a guide to them, in one process, without model or GPU.

Megatron's own ``dist_checkpointing.save`` writes. Format ``fully_reshardable``: each parameter and each of its
optimizer tensors is one global tensor, which any other layout can load.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import distributed as dist

from megatron_moetion.mcore.rng import decoded

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""What a loader is told of the content: as ``checkpoint_metadata``, less its group."""
_OPTIMIZER_KEYS = {"main": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """One parameter or buffer of the model, as flat tensors; ``guide`` is its entry in a rank's guide.

    ``weight`` is what the model computes with, in its own type; a trained parameter has main value and moments too.
    """

    guide: Mapping[str, Any]
    weight: torch.Tensor
    main: torch.Tensor | None = None
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None


def write_checkpoint(
    folder: Path,
    tensors: Sequence[Tensors],
    guides: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
    iteration: int,
    expert_parallel_size: int | None = None,
) -> None:
    """Write the whole state into an empty folder. ``guides`` and ``states`` (the adapter's host state) by rank.

    ``expert_parallel_size``: of who will load it; None: one that, like the run's own, is 1, or is not.
    """
    document: dict[str, Any] = {
        "model": [sharded for each in tensors for sharded in _of_model(each)],
        "optimizer": _common_of_optimizers(states, expert_parallel_size),
        "param_state": [sharded for each in tensors for sharded in _of_optimizer(each)],
        "objects": _objects(guides),
        "rng_state": [
            ShardedObject("rng_state", decoded(state["rng"]), (len(states),), (rank,))
            for rank, state in enumerate(states)
        ],
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "progress": states[0]["user"],
        "topology": guides[0]["sizes"],
    }
    if states[0]["scheduler"] is not None:
        document["opt_param_scheduler"] = _scheduler(states[0])
    with _alone():
        dist_checkpointing.save(document, str(folder), content_metadata=CONTENT)


def _of_model(tensors: Tensors) -> Iterator[ShardedTensor]:
    for view in tensors.guide["views"]:
        yield _sharded(view, tensors.weight, view["key"])


def _of_optimizer(tensors: Tensors) -> Iterator[ShardedTensor]:
    for name, key in _OPTIMIZER_KEYS.items():
        found: torch.Tensor | None = getattr(tensors, name)
        if found is not None:
            for view in tensors.guide["views"]:
                yield _sharded(view, found, f"optimizer.state.{key}.{view['key']}")


def _sharded(view: Mapping[str, Any], flat: torch.Tensor, key: str) -> ShardedTensor:
    data = torch.as_strided(flat, view["shape"], view["strides"], view["first"]).contiguous()
    return ShardedTensor(
        key,
        data,
        data.dtype,
        tuple(view["shape"]),
        tuple(view["global_shape"]),
        tuple(view["global_offset"]),
        tuple(view["fragments"]) if view["fragments"] else None,
        0,
        view["prepended"],
        view["may_differ"],
    )


def _objects(guides: Sequence[Mapping[str, Any]]) -> list[ShardedObject]:
    """What modules keep beside tensors. The same on all ranks that have it, so the first one's is taken."""
    found: dict[tuple[str, tuple[int, ...]], ShardedObject] = {}
    for entry in (entry for guide in guides for entry in guide["objects"]):
        place = (entry["key"], tuple(entry["global_offset"]))
        data = _object(entry["kind"], base64.b64decode(entry["content"]))
        found.setdefault(place, ShardedObject(entry["key"], data, tuple(entry["global_shape"]), place[1]))
    return list(found.values())


def _object(kind: str, content: bytes) -> Any:
    match kind:
        case "stream":
            return io.BytesIO(content)
        case "bytes":
            return torch.tensor(list(content), dtype=torch.uint8)
        case _:
            return None


def _common_of_optimizers(states: Sequence[Mapping[str, Any]], expert_parallel_size: int | None) -> dict[Any, Any]:
    """Groups and loss scalers. A rank without experts has fewer of them, so the fullest rank's are taken.

    With expert parallelism Megatron has one optimizer for dense parameters and one for experts, else one for all.
    """
    fullest = max(states, key=lambda s: (len(s["optimizers"]), sum(len(f["groups"]) for f in s["optimizers"])))
    found = [_common_of_one(fields) for fields in fullest["optimizers"]]
    if expert_parallel_size == 1 and len(found) > 1:
        found = [one for one in found if not any(map(_is_of_experts, _groups_of(one)))]
    elif expert_parallel_size is not None and expert_parallel_size > 1 and len(found) == 1:
        groups = [{**group, "is_expert_parallel": True} for group in _groups_of(found[0])]
        found.append({**found[0], "optimizer": {"param_groups": groups}})
    return found[0] if len(found) == 1 else dict(enumerate(found))


def _groups_of(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = common["optimizer"]["param_groups"]
    return found


def _is_of_experts(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_expert_parallel"))


def _common_of_one(fields: Mapping[str, Any]) -> dict[str, Any]:
    counts = [g["step"] for g in fields["groups"] if "step" in g]
    step = fields["steps"] if fields["steps"] is not None else (counts[0] if counts else None)
    groups = [{**group, **({"step": int(step)} if step is not None else {})} for group in fields["groups"]]
    found: dict[str, Any] = {
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"],
    }
    if fields["grad_scaler"] is not None:
        scaler = dict(fields["grad_scaler"])
        scaler["scale"] = torch.tensor([scaler["scale"]], dtype=torch.float32)
        found["grad_scaler"] = scaler
    return found


def _scheduler(state: Mapping[str, Any]) -> dict[str, Any]:
    """As ``OptimizerParamScheduler.state_dict`` has it."""
    names = (
        "max_lr", "lr_warmup_steps", "lr_decay_style", "lr_decay_steps", "min_lr", "start_wd", "end_wd",
        "wd_incr_style", "wd_incr_steps",
    )  # fmt: skip
    given = state["given"]["scheduler"] or {}
    return {**{name: given[name] for name in names if name in given}, "num_steps": state["scheduler"]}


@contextmanager
def _alone() -> Iterator[None]:
    """Megatron's writer speaks to a process group: one of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
