# SPDX-License-Identifier: Apache-2.0
"""Forward passes of Transformer Engine's modules in torch's own operations, so that its models train on the CPU.

Parameters, their attributes and everything that Megatron-Core builds around the modules stay the real ones; tensor
parallel communication inside a module, FP8 and the kernels' arithmetic are not there.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as te
from torch.nn import functional as F


def install() -> None:
    """Replace the forward passes, for the rest of the process."""
    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _norm_linear
    te.GroupedLinear.forward = _grouped_linear
    te.LayerNorm.forward = te.RMSNorm.forward = _norm
    te.DotProductAttention.forward = _attention


class _Members(torch.autograd.Function):
    """A grouped tensor as a plain tensor of the same shape, in the same memory."""

    @staticmethod
    def forward(ctx: Any, grouped: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        return data.view(grouped.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """The elements of a parameter, which Transformer Engine may keep beside it, as a tensor with its gradient."""
    data = getattr(parameter, "rowwise_data", None)
    return parameter if data is None else _Members.apply(parameter, data)


def _linear(self: Any, x: torch.Tensor, **kwargs: Any) -> Any:
    bias = self.bias if self.use_bias else None
    if self.return_bias:
        return F.linear(x, self.weight), self.bias
    return F.linear(x, self.weight, bias)


def _norm_linear(self: Any, x: torch.Tensor, **kwargs: Any) -> Any:
    bias = None if self.normalization == "RMSNorm" else self.layer_norm_bias
    return _linear(self, _normalized(x, self.layer_norm_weight, bias, self.eps, self.zero_centered_gamma))


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _normalized(x, self.weight, getattr(self, "bias", None), self.eps, self.zero_centered_gamma)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, zero_centered: bool
) -> torch.Tensor:
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _grouped_linear(self: Any, x: torch.Tensor, m_splits: Any, **kwargs: Any) -> Any:
    weights = _each(self, "weight", self.single_grouped_weight)
    biases = _each(self, "bias", self.single_grouped_bias) if self.use_bias else [None] * self.num_gemms
    sizes = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits)
    parts = [
        F.linear(tokens, weight, None if self.return_bias else bias)
        for tokens, weight, bias in zip(x.split(sizes), weights, biases, strict=True)
    ]
    out = torch.cat(parts)
    return (out, biases) if self.return_bias else out


def _each(module: Any, name: str, is_grouped: bool) -> list[torch.Tensor]:
    if is_grouped:
        return list(plain(getattr(module, name)).unbind())
    return [getattr(module, f"{name}{i}") for i in range(module.num_gemms)]


def _attention(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any) -> Any:
    """Causal, of shape [sequence, batch, heads, channels]; the heads are flattened in what is returned."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)
