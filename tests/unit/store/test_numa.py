# SPDX-License-Identifier: Apache-2.0
"""The NUMA node of a GPU as sysfs tells it, and the kernel's calls for memory of a node."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.store.numa import ANYWHERE, LinuxNuma, NumaNode, numa_node

BUS_ID = "0000:17:00.0"


def sysfs(folder: Path, memory: str = "0-1", node: str | None = "1", cpulist: str | None = "8-11,24,26-27") -> Path:
    files = {
        "devices/system/node/has_memory": memory,
        f"bus/pci/devices/{BUS_ID}/numa_node": node,
        f"devices/system/node/node{node}/cpulist": cpulist,
    }
    for name, text in files.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{text}\n")
    return folder


def test_a_gpu_has_a_node_and_the_node_has_cpus(tmp_path: Path) -> None:
    found = numa_node(BUS_ID, sysfs(tmp_path))
    assert found == NumaNode(number=1, cpus=frozenset({8, 9, 10, 11, 24, 26, 27}), note="NUMA node 1")


def test_sysfs_names_devices_in_lower_case(tmp_path: Path) -> None:
    here = sysfs(tmp_path)
    (here / "bus/pci/devices" / BUS_ID).rename(here / "bus/pci/devices" / "0000:c7:00.0")
    assert numa_node("0000:C7:00.0", here).number == 1


def test_without_a_gpu_memory_may_be_anywhere(tmp_path: Path) -> None:
    assert numa_node("", sysfs(tmp_path)) == ANYWHERE


def test_one_node_is_no_choice(tmp_path: Path) -> None:
    assert numa_node(BUS_ID, sysfs(tmp_path, memory="0")) == NumaNode(number=None, note="one NUMA node")


@pytest.mark.parametrize(
    "files",
    [{"node": "-1"}, {"node": None}, {"node": "none"}, {"memory": "0-x"}],
    ids=["-1", "no file", "text", "list"],
)
def test_what_sysfs_does_not_tell_is_not_guessed(tmp_path: Path, files: dict[str, str | None]) -> None:
    found = numa_node(BUS_ID, sysfs(tmp_path, **files))  # type: ignore[arg-type]
    assert found == NumaNode(number=None, note="NUMA node of the GPU not known")


@pytest.mark.parametrize("cpulist", [None, "x"])
def test_cpus_that_are_not_known_leave_the_node(tmp_path: Path, cpulist: str | None) -> None:
    assert numa_node(BUS_ID, sysfs(tmp_path, cpulist=cpulist)) == NumaNode(number=1, note="NUMA node 1")


def test_the_kernel_places_pages_and_tells_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        mapping = MappedFile(file.fileno(), 4 * mmap.PAGESIZE)
    kernel = LinuxNuma()
    try:
        kernel.prefer(mapping.address, mapping.nbytes, 0)
        found = kernel.nodes_of([mapping.address + mmap.PAGESIZE * n for n in range(4)])
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip(f"this process may not choose NUMA nodes: {error.strerror}")
    here = {int(p.name.removeprefix("node")) for p in Path("/sys/devices/system/node").glob("node[0-9]*")} or {0}
    assert set(found) <= here


def test_a_node_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file:
        mapping = MappedFile(file.fileno(), mmap.PAGESIZE)
    with pytest.raises(OSError, match=f"{os.strerror(errno.EINVAL)}|{os.strerror(errno.EPERM)}"):
        LinuxNuma().prefer(mapping.address, mapping.nbytes, 1000)


def test_another_machine_has_no_such_calls() -> None:
    other = LinuxNuma("riscv64")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        other.prefer(0, mmap.PAGESIZE, 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        other.nodes_of([0])
