# SPDX-License-Identifier: Apache-2.0
"""What a run is given of a machine unless somebody says otherwise."""

from __future__ import annotations

from pathlib import Path

from support import ToyState

from megatron_moetion.config import MoetionConfig
from megatron_moetion.run.host import Host


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_packing_has_as_many_threads_as_were_settled_for_the_rank() -> None:
    before = num_threads()
    packer = Host().make_packer(ToyState().inventory(), MoetionConfig(run_id="r"), 3, 0)
    assert num_threads() - before == 2, "the calling thread is the third"
    packer.close()
