# SPDX-License-Identifier: Apache-2.0
"""Brings an optimizer's state back to the memory that the inventory knows, after something else has loaded it.

Transformer Engine's ``FusedAdam.load_state_dict`` makes new tensors for all of its state. And before the first step it
has no state: that is made at ``attach``, from the parameters of that time, which a checkpoint may still replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moetion.mcore.optimizer_state import MASTER_KEY
from megatron_moetion.mcore.shards import raw_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class _Home:
    """The state of one parameter as it was when this was made; keeps its tensors alive."""

    optimizer: torch.optim.Optimizer
    main: torch.Tensor
    state: dict[str, Any]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def bring_back(self) -> None:
        _bring_back(self.state, self.optimizer.state[self.main])
        if self.scales:
            all_scales: dict[torch.Tensor, dict[str, torch.Tensor]] = vars(self.optimizer)["_scales"]
            _bring_back(self.scales, all_scales.setdefault(self.main, {}))


class Homes:
    """Where the state of these optimizers is, from now on."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._homes = tuple(
            _Home(
                optimizer=optimizer,
                main=main,
                state=dict(optimizer.state[main]),
                scales=dict(vars(optimizer).get("_scales", {}).get(main, {})),
            )
            for optimizer in optimizers
            for main in _parameters(optimizer)
        )

    def bring_back(self) -> None:
        """Copy what is elsewhere by now into the tensors that there were, and give these to the optimizer again.

        Main values of an optimizer that has taken no step are made from its parameters once more, as it would do.
        """
        with torch.no_grad():
            for home in self._homes:
                home.bring_back()
            for optimizer in self._optimizers:
                if not any(group.get("step") for group in optimizer.param_groups):
                    _renew_mains(optimizer)


def _bring_back(home: dict[str, Any], now: dict[str, Any]) -> None:
    for key, original in home.items():
        found = now.get(key)
        if key == "step" or found is None or found is original:
            continue
        for to, value in zip(raw_tensors(original), raw_tensors(found), strict=True):
            to.copy_(value)
        now[key] = original


def _renew_mains(optimizer: Any) -> None:
    for parameter in _parameters(optimizer):
        master = optimizer.state[parameter].get(MASTER_KEY)
        if master is not None and master.dtype is not torch.int16:  # remainders follow the parameter by themselves
            optimizer.set_scaled_state(parameter, MASTER_KEY, parameter.detach().float().clone())


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
