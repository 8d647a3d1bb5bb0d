# SPDX-License-Identifier: Apache-2.0
"""What of a model's and an optimizer's settings cannot be captured exactly, by name, before iteration 1. Pure.

Classes are refused in ``chain.py``. Field names are those of megatron-core 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.units import Unit, UnitKind


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


def refuse_shared_scales(units: Sequence[Unit]) -> None:
    """Raise ``UnsupportedState`` where experts share a scale, so that none can be restored without the others.

    For mode ``popularity``, which restores experts as of different iterations.
    """
    holders: dict[str, set[str]] = {}
    for unit in units:
        for region in unit.regions:
            if region.together:
                holders.setdefault(region.together, set()).add(unit.name)
    experts = {unit.name for unit in units if unit.kind is UnitKind.EXPERT}
    for name, found in holders.items():
        if len(found) > 1 and found & experts:
            raise UnsupportedState(
                f"mode 'popularity' restores experts as of different iterations, and {' and '.join(sorted(found)[:2])} "
                f"share one scale of their fp16 or FP8 optimizer state (at {name}): one weight holds both. Take mode "
                f"'full' or 'exact', or --exp-avg-dtype and --exp-avg-sq-dtype fp32 or bf16 and --main-params-dtype "
                f"fp32, or a weight for each expert"
            )
