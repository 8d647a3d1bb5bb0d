# SPDX-License-Identifier: Apache-2.0
"""Which fields of an optimizer are settings and which are state: what a restart with other settings goes on with.

A field that training has left at its initial value is a setting: the value of this start acts. A field that training
has changed since (a step count, a rate under a schedule, whatever a loop changes) is state: the captured value goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moetion.mcore.optimizer_state import groups_of

_SCHEDULED = ("lr", "weight_decay")
"""What Megatron's scheduler computes anew in each step."""
_TEXT_ROOM = " " * 24
"""Stands for any text where room is reserved: longer than each that Megatron knows."""


def initial_settings(links: Sequence[MegatronOptimizer], scheduler: OptimizerParamScheduler | None) -> dict[str, Any]:
    """All settings of this start, as plain values. To be called before training changes any."""
    return {
        "groups": [groups_of(link) for link in links],
        "clip_grad": [float(link.config.clip_grad) for link in links],
        "scheduler": None
        if scheduler is None
        else {
            k: v
            for k, v in vars(scheduler).items()
            if k != "num_steps" and isinstance(v, (int, float, str, type(None)))
        },
    }


@dataclass(kw_only=True)
class Settled:
    """What to go on with. ``acts`` and ``stays``, for a person: settings that differ, by what becomes of them."""

    groups: list[list[dict[str, Any]]]
    """Of each optimizer, the fields of each parameter group."""
    acts: list[str] = field(default_factory=list)
    stays: list[str] = field(default_factory=list)


def settle(then: Mapping[str, Any], now: Mapping[str, Any], captured: Sequence[Sequence[Mapping[str, Any]]]) -> Settled:
    """The fields to go on with: ``captured`` holds each optimizer's groups as training had them.

    ``then`` is what ``initial_settings`` returned in the start that the capture is from, ``now`` what it returns now.
    """
    settled = Settled(groups=[])
    scheduled = _SCHEDULED if now["scheduler"] is not None else ()
    for before, today, found in zip(then["groups"], now["groups"], captured, strict=True):
        groups = [dict(group) for group in found]
        for group, old, new in zip(groups, before, today, strict=True):
            for name in _differing(old, new):
                moved = group.get(name) != old[name]
                if not moved:
                    group[name] = new[name]
                if name not in scheduled:
                    change = f"{name} {old[name]} -> {new[name]}"
                    _add(settled.stays, f"{change} (stays {group[name]})") if moved else _add(settled.acts, change)
        settled.groups.append(groups)
    others = [({"clip_grad": a}, {"clip_grad": b}) for a, b in zip(then["clip_grad"], now["clip_grad"], strict=True)]
    for old, new in [(then["scheduler"] or {}, now["scheduler"] or {}), *others]:
        for name in _differing(old, new):
            _add(settled.acts, f"{name} {old[name]} -> {new[name]}")
    return settled


def masked(value: Any) -> Any:
    """The value with every text of one length, so that the room it takes is the same for all settings."""
    if isinstance(value, str):
        return _TEXT_ROOM
    if isinstance(value, Mapping):
        return {k: masked(v) for k, v in value.items()}
    return [masked(v) for v in value] if isinstance(value, (list, tuple)) else value


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    return (name for name in new if name in old and old[name] != new[name])


def _add(lines: list[str], line: str) -> None:
    """Groups have much in common: each line once."""
    if line not in lines:
        lines.append(line)
