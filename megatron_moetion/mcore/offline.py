# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps of a dead rank, replayed on the CPU from its gradient log alone, without its model.

``StepLog`` does the replay, as in a recovery. It is given stand-ins that have of Megatron's optimizers what it uses.
Arithmetic is that of the CPU's Adam: for a run on CPUs bit for bit its own, for a run on GPUs the same formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.cpu_adam import FusedAdam
from megatron_moetion.mcore.steplog import StepLog

_FUSED = "FusedAdam"
_TORCH: Mapping[str, type[torch.optim.AdamW | torch.optim.Adam]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
}
_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """A part of a parameter that one rank's optimizer steps on: flat tensors of one length, in place."""

    link: int
    group: int
    main: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    gradient: torch.Tensor
    """As it was reduced, in any type."""


def require_replayable(optimizers: Sequence[Mapping[str, Any]]) -> None:
    """``ConfigError`` where a CPU cannot take the steps of one of these kinds, as the guide has them."""
    for number, kind in enumerate(optimizers):
        if kind["name"] != _FUSED and kind["name"] not in _TORCH:
            raise ConfigError(
                f"optimizer {number} of the run is a {kind['name']}, and this state is captures and logged gradients "
                f"(mode 'exact'): its steps can be replayed on its own machines only, by a restart of the run"
            )


def offline_steps(
    stretches: Sequence[Stretch], optimizers: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> StepLog:
    """What replays one rank's steps. ``optimizers``: of each its kind, as the guide has it; ``state``: the adapter's.

    Errors as ``require_replayable``.
    """
    require_replayable(optimizers)
    fields = state["optimizers"]
    links = [
        _Link(kind, fields[number], [s for s in stretches if s.link == number])
        for number, kind in enumerate(optimizers)
    ]
    as_links = cast("list[MegatronOptimizer]", links)
    log = StepLog(cast(MegatronOptimizer, _Top()), as_links, [torch.zeros(0) for _ in links])
    log.remember(max(1, len(state["steps"])))
    log.begin_replay(state)
    return log


class _Top:
    def clip_grad_norm(self, clip_grad: float) -> None:
        raise AssertionError("norms come from the log")


class _Scaler:
    def __init__(self) -> None:
        self.inv_scale = torch.ones(1)

    def update(self, found_inf: bool) -> None:
        raise AssertionError("scales come from the log")


class _Link:
    """In place of a ``MegatronOptimizer`` that holds state."""

    def __init__(self, kind: Mapping[str, Any], fields: Mapping[str, Any], stretches: Sequence[Stretch]) -> None:
        groups: list[dict[str, Any]] = [{"params": []} for _ in fields["groups"]]
        self._parameters: list[torch.nn.Parameter] = []
        self.found_inf = torch.zeros(1)
        self.grad_scaler = _Scaler()
        self.config = SimpleNamespace(clip_grad=0.0)
        states: dict[torch.Tensor, Any] = {}
        for stretch in stretches:
            parameter = torch.nn.Parameter(stretch.main)
            vars(parameter)["main_grad"] = stretch.gradient
            groups[stretch.group]["params"].append(parameter)
            self._parameters.append(parameter)
            states[parameter] = {name: getattr(stretch, name) for name in _STATE}
        if kind["name"] == _FUSED:
            self.optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=kind["adam_w_mode"])
        else:
            self.optimizer = _TORCH[kind["name"]](groups, foreach=False)
            states = {p: {"step": torch.zeros(()), **state} for p, state in states.items()}
        self.optimizer.state.update(states)

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return self._parameters

    def _copy_model_grads_to_main_grads(self) -> None:
        for parameter in self._parameters:
            parameter.grad = vars(parameter)["main_grad"].float()

    def _collect_main_grad_data_for_unscaling(self) -> list[torch.Tensor]:
        return [p.grad.data for p in self._parameters if p.grad is not None]
