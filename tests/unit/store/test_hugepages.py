# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel offers huge pages for a file, and how many it gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moetion.store.hugepages import mapped_bytes, reason, why_not_offered

SWITCH = "always within_size advise [never] deny force\n"
MOUNTS = [
    "30 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
    "41 30 0:35 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw,size=24684092k",
    "42 30 0:36 / /mnt/huge rw - tmpfs none rw,size=8388608k,huge=advise",
    "43 30 0:37 / /mnt/never rw - tmpfs none rw,huge=never",
    "a line of a kernel to come",
]


@pytest.mark.parametrize(
    ("device", "switch", "expected"),
    [
        ("0:36", SWITCH, None),
        ("0:35", SWITCH, "/dev/shm is mounted without huge=advise"),
        ("0:35", SWITCH.replace("[never]", "never").replace("advise", "[advise]"), "/dev/shm is mounted without huge"),
        ("0:37", SWITCH, "/mnt/never is mounted without huge=advise"),
        ("0:35", SWITCH.replace("[never]", "never").replace("force", "[force]"), None),
        ("0:36", SWITCH.replace("[never]", "never").replace("deny", "[deny]"), "the kernel denies them"),
        ("254:0", SWITCH, "/ is no tmpfs"),
        ("0:99", SWITCH, "its mount is not known"),
        ("0:36", "", "the kernel has none for shared memory"),
    ],
)
def test_the_option_of_the_mount_decides_except_for_deny_and_force(
    device: str, switch: str, expected: str | None
) -> None:
    found = reason(device, MOUNTS, switch)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_this_machine_gives_an_answer(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        found = why_not_offered(file.fileno())
    assert found is None or found


SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:23 5                          /dev/shm/before
ShmemPmdMapped:     4096 kB
7f0000400000-7f0000800000 rw-s 00000000 00:23 6                          /dev/shm/ours
Size:               4096 kB
ShmemPmdMapped:     2048 kB
FilePmdMapped:         0 kB
7f0000800000-7f0000c00000 rw-s 00400000 00:23 6                          /dev/shm/ours
ShmemPmdMapped:     4096 kB
7f0000c00000-7f0001000000 rw-s 00000000 00:23 7                          /dev/shm/behind
ShmemPmdMapped:     4096 kB
"""


def test_huge_pages_are_counted_in_all_parts_of_a_mapping_and_in_no_other() -> None:
    assert mapped_bytes(0x7F0000400000, 8 << 20, SMAPS.splitlines()) == 6 << 20
    assert mapped_bytes(0x7F0000400000, 1 << 20, SMAPS.splitlines()) == 1 << 20, "no more than the mapping has"
    assert mapped_bytes(0x10000, 1 << 20, SMAPS.splitlines()) == 0
