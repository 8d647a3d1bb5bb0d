# SPDX-License-Identifier: Apache-2.0
"""What of a model's and an optimizer's settings cannot be captured exactly, by name, before iteration 1. Pure.

Classes are refused in ``chain.py``. Field names are those of megatron-core 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_moetion.errors import UnsupportedState


def refuse_unsupported(config: Any, links: Sequence[MegatronOptimizer], *, log_steps: bool) -> None:
    """Raise ``UnsupportedState`` for what ``config``, a ``TransformerConfig``, or a link's ``OptimizerConfig`` asks.

    ``log_steps`` says whether steps are to be replayed (mode ``exact``).
    """
    if getattr(config, "fp8", None):
        raise UnsupportedState("--fp8-format is not supported: quantised parameters carry scales beside their bytes")
    if log_steps and getattr(config, "qk_clip", False):
        raise UnsupportedState("qk_clip is not supported in mode 'exact': it changes parameters after the step")
    if log_steps and any(link.config.reuse_grad_buf_for_mxfp8_param_ag for link in links):
        raise UnsupportedState(
            "--reuse-grad-buf-for-mxfp8-param-ag is not supported in mode 'exact': it overwrites gradients "
            "before they are logged"
        )
