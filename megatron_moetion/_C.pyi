# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels (``csrc/``). Addresses are plain integers; the memory behind them is the caller's to keep.

Tables are C-contiguous ``int64`` arrays, read in place, and must not change during a call. Every method of
``HostPool`` releases the GIL; concurrent callers of one pool take turns. A bad table raises ``ValueError``
with the row and its values before any byte moves.
"""

import numpy as np
import numpy.typing as npt

FORMAT_DIGEST_VERSION: int

def available_isas() -> list[str]:
    """Instruction sets that this machine and build can run, slowest first: ``scalar``, ``avx2``, ``avx512``."""

class Cancel:
    """A flag that stops a ``pack`` from another thread."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    def is_set(self) -> bool: ...

class HostPool:
    """Persistent threads that pack. They end with the object. Not usable in a forked child (``RuntimeError``)."""

    def __init__(self, num_threads: int, isa: str = "auto") -> None:
        """``num_threads`` counts the calling thread. ``isa``: ``auto`` or one of ``available_isas()``."""
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def pack(
        self,
        pieces: npt.NDArray[np.int64],
        chunks: npt.NDArray[np.int64],
        digests: npt.NDArray[np.uint64],
        cancel: Cancel | None = None,
    ) -> bool:
        """Gather pieces into chunks and digest each chunk in the same pass.

        ``pieces``: rows (src_address, dst_address, nbytes). ``chunks``: rows (dst_address, nbytes, first_piece,
        num_pieces); a chunk's pieces lie inside it, ordered by destination, without overlap; chunks are
        disjoint. Bytes of a chunk that no piece covers become zero. ``digests``: one value a chunk, written.
        A destination may be aligned in any way; multiples of 64 are fastest. False: cancelled (noticed every
        256 KiB a thread), and then chunks and digests are garbage.
        """
    def digest(self, chunks: npt.NDArray[np.int64], digests: npt.NDArray[np.uint64]) -> None:
        """Digest of each row (address, nbytes) of ``chunks``, written to ``digests``."""
    def scatter(self, pieces: npt.NDArray[np.int64]) -> None:
        """Copy each row (src_address, dst_address, nbytes); destinations must not overlap."""
    def copy(self, pieces: npt.NDArray[np.int64], chunks: npt.NDArray[np.int64], *, streaming: bool = False) -> None:
        """The bytes that ``pack`` moves, by memcpy or streaming stores alone: a baseline for benchmarks."""
    def prefault(self, address: int, nbytes: int) -> None:
        """Make all pages of a span present and writable. Contents stay."""
