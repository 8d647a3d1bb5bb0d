# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's quantising kernels in torch's own operations, so that quantised parameters live on the CPU.

The tensors, their quantisers and everything that calls these functions stay the real ones. What is written follows the
formats' definitions; that it equals what the kernels write, bit for bit, is not claimed and not needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformer_engine_torch as tex
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor import utils
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer, MXFP8Tensor

_TYPES = {DType.kFloat8E4M3: (torch.float8_e4m3fn, 448.0), DType.kFloat8E5M2: (torch.float8_e5m2, 57344.0)}
MX_BLOCK = 32


def install() -> None:
    """Replace the kernels, for the rest of the process."""
    tex.quantize = quantize
    tex.dequantize = dequantize
    tex.fp8_transpose = transpose
    tex.compute_amax = lambda source, amax: amax.copy_(source.abs().max().float())
    tex.fp8_block_scaling_compute_partial_amax = partial_amax
    tex.fp8_block_scaling_partial_cast = partial_cast
    utils.multi_tensor_applier = lambda op, overflow, lists, *args: op(lists, *args)
    utils.multi_tensor_scale = _scale
    utils.multi_tensor_compute_scale_and_scale_inv = _scales_of


def quantize(source: torch.Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """A new quantised tensor, or ``out`` with other contents."""
    if isinstance(quantizer, MXFP8Quantizer):
        return _quantize_mx(source, quantizer, out)
    if isinstance(quantizer, Float8BlockQuantizer):
        return _quantize_blocks(source, quantizer, out)
    assert isinstance(quantizer, Float8Quantizer | Float8CurrentScalingQuantizer), type(quantizer)
    if isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.reshape(1)
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, source.abs().max().float()))
    else:
        scale = _scale_of(source.abs().max().float().reshape(1), quantizer.dtype)
    data = _cast(source.float() * scale, quantizer.dtype)
    if out is None:
        return Float8Tensor(
            shape=source.shape,
            dtype=source.dtype,
            data=data,
            fp8_scale_inv=1 / scale,
            fp8_dtype=quantizer.dtype,
            requires_grad=False,
            data_transpose=data.t().contiguous() if quantizer.columnwise_usage else None,
            quantizer=quantizer,
            device=source.device,
        )
    out._data.copy_(data.view(out._data.shape))
    out._scale_inv.copy_((1 / scale).view(out._scale_inv.shape))
    if out._transpose is not None:
        out._transpose.copy_(out._data.t())
        out._transpose_invalid = False
    return out


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """As floating-point numbers."""
    kind, _ = _TYPES[tensor._fp8_dtype]
    if isinstance(tensor, MXFP8Tensor):
        rows, columns = tensor._rowwise_data.shape
        scale = tensor._rowwise_scale_inv[:rows, : columns // MX_BLOCK]
        factor = torch.exp2(scale.float() - 127).repeat_interleave(MX_BLOCK, dim=1)
        values = tensor._rowwise_data.view(kind).float() * factor
    elif isinstance(tensor, Float8BlockwiseQTensor):
        block = tensor._quantizer.block_len
        values = tensor._rowwise_data.view(kind).float() * _spread(tensor._rowwise_scale_inv, tensor.shape, block)
    else:
        values = tensor._data.view(kind).float() * tensor._scale_inv
    return values.to({DType.kBFloat16: torch.bfloat16, DType.kFloat32: torch.float32}[DType.cast(dtype)])


def transpose(data: torch.Tensor, dtype: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes of a matrix, the other way round."""
    turned = data.reshape(-1, data.shape[-1]).t().contiguous()
    return turned if out is None else out.copy_(turned)


def partial_amax(source: torch.Tensor, amax: torch.Tensor, h: int, w: int, start: int, block: int) -> None:
    """The largest value of each block of a matrix, as far as its elements [start, start + n) tell."""
    flat = torch.zeros(h * w)
    flat[start : start + source.numel()] = source.float().reshape(-1).abs()
    found = _largest(flat.view(h, w), block)
    amax[: found.shape[0], : found.shape[1]] = found


def partial_cast(
    source: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, h: int, w: int, start: int, block: int, dtype: Any
) -> None:
    """Elements [start, start + n) of a matrix, by the scale of each block."""
    factors = _spread(scale, (h, w), block).reshape(-1)[start : start + source.numel()]
    out.copy_(_cast(source.float().reshape(-1) * factors, dtype))


def _quantize_mx(source: torch.Tensor, quantizer: MXFP8Quantizer, out: Any) -> Any:
    values = source.detach().float().view(source.shape[0], -1)
    rows, columns = values.shape
    found = {}
    for name, is_columnwise in (("rowwise", False), ("columnwise", True)):
        blocks = values.t() if is_columnwise else values
        amax = blocks.reshape(blocks.shape[0], -1, MX_BLOCK).abs().amax(dim=2)
        exponent = torch.ceil(torch.log2(amax.clamp_min(2.0**-100) / _TYPES[quantizer.dtype][1]))
        data = _cast(blocks * torch.exp2(-exponent).repeat_interleave(MX_BLOCK, dim=1), quantizer.dtype)
        scale = (exponent + 127).to(torch.uint8)
        found[name] = (data.t().contiguous(), scale.t()) if is_columnwise else (data, scale)
    if out is None:
        specs = quantizer.inner_tensor_specs((rows, columns))
        parts = {name.removeprefix("_"): torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}
        out = MXFP8Tensor(
            shape=source.shape,
            dtype=source.dtype,
            rowwise_data=parts["rowwise_data"],
            rowwise_scale_inv=parts["rowwise_scale_inv"],
            columnwise_data=parts.get("columnwise_data"),
            columnwise_scale_inv=parts.get("columnwise_scale_inv"),
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            requires_grad=False,
            with_gemm_swizzled_scales=False,
            device=source.device,
        )
    for name, (data, scale) in found.items():
        if getattr(out, f"_{name}_data") is not None:
            getattr(out, f"_{name}_data").copy_(data)
            getattr(out, f"_{name}_scale_inv")[: scale.shape[0], : scale.shape[1]] = scale
    return out


def _quantize_blocks(source: torch.Tensor, quantizer: Float8BlockQuantizer, out: Any) -> Any:
    assert quantizer.block_scaling_dim == 2, "weights"
    shape = tuple(source.shape)
    amax = torch.zeros(quantizer.get_scale_shape(shape, False))
    partial_amax(source.detach(), amax, *shape, 0, quantizer.block_len)
    scale = _scale_of(amax, quantizer.dtype, power_of_2=quantizer.force_pow_2_scales)
    data = torch.empty(source.numel(), dtype=torch.uint8)
    partial_cast(source.detach(), data, scale, *shape, 0, quantizer.block_len, quantizer.dtype)
    if out is None:
        out = Float8BlockwiseQTensor(
            shape=source.shape,
            dtype=source.dtype,
            rowwise_data=torch.empty(shape, dtype=torch.uint8),
            rowwise_scale_inv=torch.empty_like(scale),
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            is_2D_scaled=True,
            requires_grad=False,
            device=source.device,
        )
    out._rowwise_data.copy_(data.view(shape))
    out._rowwise_scale_inv.copy_(1 / scale)
    if quantizer.columnwise_usage:
        out._create_columnwise()
    return out


def _cast(values: torch.Tensor, dtype: Any) -> torch.Tensor:
    kind, largest = _TYPES[dtype]
    return values.detach().clamp(-largest, largest).to(kind).view(torch.uint8)


def _scale_of(amax: torch.Tensor, dtype: Any, *, power_of_2: bool = False) -> torch.Tensor:
    scale = torch.where(amax > 0, _TYPES[dtype][1] / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def _scales_of(lists: Sequence[Any], largest: float, power_of_2: bool, epsilon: float) -> None:
    (dtype,) = [t for t, (_, value) in _TYPES.items() if value == largest]
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale_of(amax, dtype, power_of_2=power_of_2))
        inverse.copy_(1 / scale)


def _scale(lists: Sequence[Any], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def _largest(matrix: torch.Tensor, block: int) -> torch.Tensor:
    rows = [part.amax(dim=0) for part in matrix.split(block)]
    return torch.stack([torch.stack([part.amax() for part in row.split(block)]) for row in rows])


def _spread(scale: torch.Tensor, shape: Sequence[int], block: int) -> torch.Tensor:
    rows, columns = (math.ceil(n / block) for n in shape)
    spread = scale[:rows, :columns].repeat_interleave(block, dim=0).repeat_interleave(block, dim=1)
    return spread[: shape[0], : shape[1]]
