# SPDX-License-Identifier: Apache-2.0
"""Momentum whose every matrix is made orthogonal before it moves the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    """So that an update is about as large as one of Adam."""
    assert mode == "spectral"
    return float(max(size_out, size_in)) ** 0.5


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """State: ``momentum_buffer``, of the parameter's shape. With decay ``l2`` a step writes into gradients."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        weight_decay: float,
        *,
        weight_decay_method: str,
        fp32_matmul_prec: str,
        scaled_orthogonalize_fn: Callable[..., torch.Tensor],
        nesterov: bool = False,
        use_nesterov: bool = False,
        **more: Any,
    ) -> None:
        self.nesterov = nesterov or use_nesterov
        self.weight_decay_method = weight_decay_method
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **more})
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for parameter in group["params"]:
            if not self.state[parameter] and (parameter.grad is not None or not skip_non_grad_params):
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # As in the real base class: what it means is for a subclass to say, and all of Megatron-Core's do.
        raise NotImplementedError(f"{type(self).__name__} does not say how a gradient is made orthogonal")

    def scaled(self, update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        """What a subclass makes of an update."""
        return update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad, self.state[parameter]
                if self.weight_decay_method == "l2":
                    gradient.add_(parameter, alpha=group["weight_decay"])
                else:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                if self.nesterov:
                    average = gradient.lerp(average, group["momentum"])
                fields = {k: v for k, v in group.items() if k != "params"}
                update = self.scaled(self.orthogonalize(parameter, average, **fields), state, group)
                parameter.sub_(update, alpha=group["lr"])


class AdaptiveMuon(OrthogonalizedOptimizer):
    """State: a second moment, too, of the parameter's shape (``adamuon``) or of its rows (``normuon``)."""

    moment2_method: str

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for parameter in group["params"]:
            if not self.state[parameter] and (parameter.grad is not None or not skip_non_grad_params):
                rows = parameter.data if self.moment2_method == "adamuon" else parameter.data[:, :1]
                self.state[parameter] |= {
                    "momentum_buffer": torch.zeros_like(parameter.data),
                    "moment2_buffer": torch.zeros_like(rows),
                }

    def scaled(self, update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        square = update.square()
        if self.moment2_method != "adamuon":
            square = square.mean(dim=1, keepdim=True)
        return update / (state["moment2_buffer"].lerp_(square, 1 - group["beta2"]).sqrt() + group["eps"])
