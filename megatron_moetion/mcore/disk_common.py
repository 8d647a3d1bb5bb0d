# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint on disk has once, and not in shards: optimizer settings, scheduler, the loop's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""What a loader is told of the content: as ``checkpoint_metadata``, less its group."""


def common_part(rank: int, guide: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What one rank knows of it, as values that a host state can hold. ``state``: the adapter's host state."""
    names = ("optimizers", "scheduler", "given", "user")
    return {"rank": rank, "sizes": guide["sizes"], **{name: state[name] for name in names}}


def telling(ranks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of these ranks that ``common_state`` would listen to: two at most."""
    if not ranks:
        return []
    lowest, fullest = min(ranks, key=lambda r: int(r["rank"])), max(ranks, key=_fullness)
    return [lowest] if lowest is fullest else [lowest, fullest]


def common_state(
    ranks: Sequence[Mapping[str, Any]], iteration: int, expert_parallel_size: int | None = None
) -> dict[str, Any]:
    """The content of ``common.pt``. ``ranks``: ``common_part`` of each rank; the lowest one speaks for all."""
    lowest = min(ranks, key=lambda r: int(r["rank"]))
    found: dict[str, Any] = {
        "optimizer": _common_of_optimizers(ranks, expert_parallel_size),
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "progress": lowest["user"],
        "topology": lowest["sizes"],
        "content_metadata": CONTENT,
    }
    if lowest["scheduler"] is not None:
        found["opt_param_scheduler"] = _scheduler(lowest)
    return found


def _common_of_optimizers(states: Sequence[Mapping[str, Any]], expert_parallel_size: int | None) -> dict[Any, Any]:
    """Groups and loss scalers. A rank without experts has fewer of them, so the fullest rank's are taken.

    With expert parallelism Megatron has one optimizer for dense parameters and one for experts, else one for all.
    """
    found = [_common_of_one(fields) for fields in max(states, key=_fullness)["optimizers"]]
    if expert_parallel_size == 1 and len(found) > 1:
        found = [one for one in found if not any(map(_is_of_experts, _groups_of(one)))]
    elif expert_parallel_size is not None and expert_parallel_size > 1 and len(found) == 1:
        groups = [{**group, "is_expert_parallel": True} for group in _groups_of(found[0])]
        found.append({**found[0], "optimizer": {"param_groups": groups}})
    return found[0] if len(found) == 1 else dict(enumerate(found))


def _fullness(state: Mapping[str, Any]) -> tuple[int, int]:
    return len(state["optimizers"]), sum(len(fields["groups"]) for fields in state["optimizers"])


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
