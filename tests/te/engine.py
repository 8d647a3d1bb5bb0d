# SPDX-License-Identifier: Apache-2.0
"""Makes the real Transformer Engine believe that there is a GPU, so that its modules and optimizers are made here.

Tests and the ranks that they start call ``pretend``; every kernel that is called fails all the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


def pretend() -> None:
    """Redirect torch's CUDA names to the CPU, with Transformer Engine in place, and answer for a Hopper GPU.

    Raises ``ImportError`` or ``OSError`` where Transformer Engine cannot be imported.
    """
    # Before Megatron-Core, which install imports, and which then looks whether this can be imported.
    import transformer_engine.pytorch  # noqa: F401

    from megatron_moetion.mcore import cpu_device

    cpu_device.install()
    _redirect_optimizers()
    device = SimpleNamespace(
        name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *which: device
    torch.cuda.get_device_capability = lambda *which: (device.major, device.minor)


def _redirect_optimizers() -> None:
    """Norms and scaling of gradients as Megatron-Core has them where Transformer Engine is missing."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    clip_grads.multi_tensor_applier = optimizer.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None
