# SPDX-License-Identifier: Apache-2.0
"""MoEtion: in-memory checkpointing for Mixture-of-Experts training on Megatron-Core.

Importing this package loads nothing of the runtime: ``attach``, ``init_process_group``, ``run_warm``
and ``MoetionConfig`` are resolved on first use, so a run without ``--moetion`` never pays for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moetion.config import MoetionConfig as MoetionConfig
    from megatron_moetion.mcore.attach import attach as attach
    from megatron_moetion.rendezvous import init_process_group as init_process_group
    from megatron_moetion.warm.own import run_warm as run_warm

__version__ = "0.1.0"
__all__ = ["MoetionConfig", "__version__", "attach", "init_process_group", "run_warm"]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from megatron_moetion.mcore.attach import attach

        return attach
    if name == "MoetionConfig":
        from megatron_moetion.config import MoetionConfig

        return MoetionConfig
    if name == "init_process_group":
        from megatron_moetion.rendezvous import init_process_group

        return init_process_group
    if name == "run_warm":
        from megatron_moetion.warm.own import run_warm

        return run_warm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
