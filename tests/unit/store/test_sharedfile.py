# SPDX-License-Identifier: Apache-2.0
"""Memory of arenas, as far as it is asked for before an arena is made."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_moetion.store.groups import left_by_groups
from megatron_moetion.store.sharedfile import available_bytes


def test_what_is_available_is_what_the_kernel_and_a_container_allow(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       100 kB\nMemAvailable:    60 kB\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 60 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    for most, found in (("max", 60 << 10), ("5000", 4000), ("900", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert available_bytes(tmp_path, tmp_path) == found


def test_the_first_version_of_groups_counts_too(tmp_path: Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup" / "memory" / "docker" / "1"
    group.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("9:cpu:/docker/2\n4:memory:/docker/1\n0::/docker/3\n")
    assert left_by_groups(proc, tmp_path / "cgroup") == sys.maxsize
    (group / "memory.limit_in_bytes").write_text("10000\n")
    (group / "memory.usage_in_bytes").write_text("9000\n")
    (group / "memory.stat").write_text("active_file 1\ntotal_active_file 300\ntotal_inactive_file 400\n")
    assert left_by_groups(proc, tmp_path / "cgroup") == 1700
    (group.parents[1] / "memory.limit_in_bytes").write_text("5000\n")
    (group.parents[1] / "memory.usage_in_bytes").write_text("4900\n")
    assert left_by_groups(proc, tmp_path / "cgroup") == 100


def test_the_limits_of_all_groups_count_and_files_that_can_be_dropped_do_not(tmp_path: Path) -> None:
    """As of a job in a group of its own below that of the machine's service."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    inner = groups / "slurm" / "job_1"
    inner.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable:    60 kB\n")
    (proc / "self" / "cgroup").write_text("0::/slurm/job_1\n")
    for group, most, used in ((inner, "max", "9000"), (inner.parent, "10000", "9500")):
        (group / "memory.max").write_text(most)
        (group / "memory.current").write_text(used)
    assert available_bytes(proc, groups) == 500
    (inner.parent / "memory.stat").write_text("anon 1000\nactive_file 3000\ninactive_file 4000\nshmem 1500\n")
    assert available_bytes(proc, groups) == 7500
