# SPDX-License-Identifier: Apache-2.0
"""In-memory checkpoints for Megatron-LM's own ``pretrain()``: one line before it, or a launcher in front of a script.

``python -m megatron_moetion.megatron_lm pretrain_gpt.py FLAGS --moetion`` needs no change in the script;
``megatron_lm.install()`` is the same from within one. ``seams`` lists what is replaced in ``megatron.training``.
"""

from __future__ import annotations

from megatron_moetion.megatron_lm.seams import install as install

__all__ = ["install"]
