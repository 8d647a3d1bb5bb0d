# SPDX-License-Identifier: Apache-2.0
"""Memory of arenas, as far as it is asked for before an arena is made."""

from __future__ import annotations

from pathlib import Path

from megatron_moetion.store.sharedfile import available_bytes


def test_what_is_available_is_what_the_kernel_and_a_container_allow(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       100 kB\nMemAvailable:    60 kB\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 60 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    for most, found in (("max", 60 << 10), ("5000", 4000), ("900", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert available_bytes(tmp_path, tmp_path) == found
