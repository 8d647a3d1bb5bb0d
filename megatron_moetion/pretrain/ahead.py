# SPDX-License-Identifier: Apache-2.0
"""What all ranks of a job have in common before any of them is one: modules, and a corpus. Nothing is computed."""

from __future__ import annotations

import argparse
import importlib

from megatron_moetion.pretrain.corpus import SampleSource
from megatron_moetion.pretrain.startup import build_source
from megatron_moetion.warm.later import LATER

MODULES = (
    "megatron_moetion.pretrain.loop",
    "megatron_moetion.mcore.attach",
    *LATER,
)


def load_ahead(args: argparse.Namespace) -> SampleSource | None:
    """Import what training will; the source of samples, where ranks need not build it together."""
    for name in MODULES:
        importlib.import_module(name)
    return build_source(args) if args.data_path is None else None
