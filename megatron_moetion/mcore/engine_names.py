# SPDX-License-Identifier: Apache-2.0
"""What Megatron-Core leaves unbound where Transformer Engine is not installed, with a GPU as without one."""

from __future__ import annotations


def bind_engine_names() -> None:
    """Give Megatron-Core the names that it uses and only Transformer Engine binds. Safe to call twice."""
    from megatron.core.transformer.moe import moe_utils

    if "te_general_gemm" not in vars(moe_utils):
        # Every router of 0.16 asks whether it is None.
        moe_utils.te_general_gemm = None
