# SPDX-License-Identifier: Apache-2.0
"""Lion: the sign of an average of gradients. State: ``exp_avg``, and ``step``, a plain number that it does not use."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """One moment of the parameter's shape."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.01
    ) -> None:
        self.weight_decay_method = "decoupled"
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for parameter in group["params"]:
            if not self.state[parameter] and (parameter.grad is not None or not skip_non_grad_params):
                self.state[parameter] |= {"exp_avg": torch.zeros_like(parameter.data), "step": 0}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(torch.sign(state["exp_avg"].lerp(parameter.grad, 1 - fast)), alpha=group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - slow)
