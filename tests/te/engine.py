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
    device = SimpleNamespace(
        name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *which: device
    torch.cuda.get_device_capability = lambda *which: (device.major, device.minor)
