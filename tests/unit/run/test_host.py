# SPDX-License-Identifier: Apache-2.0
"""What a run is given of a machine unless somebody says otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(("ends", "is_done"), [("pass", True), ("raise SystemExit(0)", True), ("1 / 0", False)])
def test_what_is_for_the_end_is_not_done_after_an_exception(ends: str, is_done: bool) -> None:
    """A supervisor restarts the job then, which needs the memory that would be removed."""
    script = f"from megatron_moetion.run.host import Host\nHost().at_exit(lambda: print('done'))\n{ends}\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ("done" in ended.stdout) is is_done, ended.stderr
