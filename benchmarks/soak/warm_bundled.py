# SPDX-License-Identifier: Apache-2.0
"""Imported before ranks of the bundled trainer are forked: all that a rank imports, and nothing that it is."""

import gc

from megatron_moetion.mcore import cpu_device

cpu_device.install()

from megatron_moetion.mcore.engine_names import bind_engine_names  # noqa: E402

bind_engine_names()

import megatron_moetion.mcore.attach  # noqa: E402
import megatron_moetion.pretrain.loop  # noqa: E402, F401

gc.freeze()  # ranks share what was imported; their collectors would touch, and so copy, all of it
