# SPDX-License-Identifier: Apache-2.0
"""What a run is given of a machine unless somebody says otherwise."""

from __future__ import annotations

from pathlib import Path

from support import ToyState

from megatron_moetion.config import MoetionConfig
from megatron_moetion.run.host import Host
from megatron_moetion.snapshot.packer import HostPool


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_packing_has_the_threads_that_the_rank_has_and_no_others() -> None:
    pool = HostPool(3)
    before = num_threads()
    Host().make_packer(ToyState().inventory(), MoetionConfig(run_id="r"), pool, 0).close()
    assert num_threads() == before
