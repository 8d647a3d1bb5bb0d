# SPDX-License-Identifier: Apache-2.0
"""A file in memory as an array, for this process alone: children that it forks inherit neither memory nor descriptor.

``mmap.mmap`` will not do: it keeps a duplicate of the descriptor, and forked children (data loader workers, writers of
checkpoints) keep that and the mapping for as long as they live, which may be longer than their parent.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

from megatron_moetion.store.hostmemory import PLAIN, HostMemory

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10  # Linux; the module mmap does not name it


class MappedFile:
    """Bytes of a file, shared and writable, all in memory. Unmapped when the last array over them has gone.

    ``OSError`` where memory is short.
    """

    def __init__(self, fd: int, nbytes: int, memory: HostMemory = PLAIN) -> None:
        self.nbytes = nbytes
        self.address = _map(None, nbytes, fd, 0)
        weakref.finalize(self, _libc.munmap, self.address, nbytes).atexit = False
        self._memory = memory
        self.population = memory.populate(fd, self.address, nbytes)

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.nbytes,), "data": (self.address, False)}

    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes; the array keeps the mapping alive."""
        return np.asarray(self)

    def replace(self, fd: int) -> None:
        """Put another file of the same size and contents in the old one's place: arrays and addresses stay good."""
        copy = MappedFile(fd, self.nbytes, self._memory)  # has all of the memory before anything is given up
        copy.array()[:] = self.array()
        _map(self.address, self.nbytes, fd, _MAP_FIXED)
        self.population = self._memory.populate(fd, self.address, self.nbytes)


def _map(address: int | None, nbytes: int, fd: int, flags: int) -> int:
    found: int | None = _libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags | mmap.MAP_SHARED, fd, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {nbytes} bytes: {os.strerror(code)}")
    if _libc.madvise(found, nbytes, mmap.MADV_DONTFORK):
        code = ctypes.get_errno()
        if address is None:
            _libc.munmap(found, nbytes)
        raise OSError(code, f"cannot keep {nbytes} bytes from forked children: {os.strerror(code)}")
    return found
