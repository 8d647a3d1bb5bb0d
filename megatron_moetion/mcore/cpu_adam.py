# SPDX-License-Identifier: Apache-2.0
"""Adam for machines without a GPU, shaped like the fused optimizers that Megatron-Core is written for.

``torch.optim.AdamW`` keeps one ``step`` per parameter; the ``FusedAdam`` of Apex and Transformer Engine
keeps one per parameter group. Megatron-Core's checkpoint code expects the latter: with torch's AdamW a
``torch_dist`` checkpoint loads wrongly. This class has the fused layout and torch's arithmetic, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam/AdamW whose only per-parameter state is ``exp_avg`` and ``exp_avg_sq``.

    A group's ``step`` is an int, absent until the group's first step; a group without parameters never gets one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if capturable or master_weights:
            raise ValueError(
                f"capturable is {capturable} and master_weights {master_weights}: there are neither CUDA graphs nor "
                "master weights of the optimizer's own on a CPU; leave both off"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is refused, as in the fused optimizers."""
        if closure is not None:
            raise ValueError("FusedAdam.step takes no closure")
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """The same operations in the same order as torch's single-tensor AdamW (Adam without ``adam_w_mode``)."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        lr, weight_decay, step = group["lr"], group["weight_decay"], float(group["step"])

        if weight_decay:
            if self.adam_w_mode:
                param.mul_(1 - lr * weight_decay)
            else:
                grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = lr / (1 - beta1**step)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        param.addcdiv_(exp_avg, denominator, value=-step_size)
