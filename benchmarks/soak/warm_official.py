# SPDX-License-Identifier: Apache-2.0
"""Imported before ranks of Megatron-LM's own training are forked: all that a rank imports, and nothing that it is."""

import gc

import megatron_lm_on_cpu  # noqa: F401

import megatron_moetion.mcore.attach
import megatron_moetion.megatron_lm.adapter  # noqa: F401

gc.freeze()  # ranks share what was imported; their collectors would touch, and so copy, all of it
