# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels (``csrc/``). Addresses are plain integers; the memory behind them is the caller's to keep.

Tables are C-contiguous ``int64`` arrays, read in place. A bad table raises ``ValueError`` with the row and its
values before any byte moves. Both pools release the GIL while they work.
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
    """Persistent threads that pack. They end with the object. Not usable in a forked child (``RuntimeError``).

    Concurrent callers take turns. Tables must not change during a call.
    """

    def __init__(self, num_threads: int, isa: str = "auto") -> None:
        """``num_threads`` counts the calling thread. ``isa``: ``auto`` or one of ``available_isas()``."""
    @property
    def isa(self) -> str: ...
    def pack(
        self,
        pieces: npt.NDArray[np.int64],
        chunks: npt.NDArray[np.int64],
        digests: npt.NDArray[np.uint64],
        cancel: Cancel | None = None,
    ) -> bool:
        """Gather pieces into chunks and digest each chunk, as written, in the same pass.

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
        """Copy what ``pack`` copies, without digests: what ``benchmarks/host_pack.py`` compares ``pack`` with."""

def built_with_cuda() -> bool:
    """Whether this build has the CUDA kernels. A GPU may still be missing."""

class DeviceError(RuntimeError):
    """A call that the device or its driver refused, or work on it that failed. Names rank, work and device."""

class DeviceLate(DeviceError):
    """Work that is not done in the time that its caller allowed. Nothing is broken; it may be waited for again."""

class Registration:
    """Host memory that the device reads and writes. Ends with ``close`` or with the object."""

    def close(self) -> None: ...

class DevicePool:
    """The GPU's twin of ``HostPool``: calls enqueue on a stream and return a ticket. Thread-safe.

    At most ``num_slots`` tickets may be open. All memory is taken here: about 24 bytes a piece and 64 a chunk for each
    slot, on the device and pinned on the host. After a ``DeviceError`` of enqueued work every later call repeats it.
    Memory that was refused breaks nothing, and neither does ``DeviceLate``: the ticket stays open.

    The end of the pool waits at most ``last_wait_s`` for open tickets. Memory of the pool that the device may still
    write after that is never freed.
    """

    def __init__(
        self,
        device: str,
        *,
        rank: int,
        max_pieces: int,
        max_chunks: int,
        num_slots: int = 2,
        num_sms: int = 4,
        timed: bool = False,
        census: bool = False,
        last_wait_s: float = 10.0,
        fault: str = "",
        seed: int = 0,
    ) -> None:
        """``device``: ``cuda:N``, or ``model:N``, where this process stands for the device.

        ``rank`` names this process in errors. Kernels run on ``num_sms`` streaming multiprocessors at most, one block
        each. ``timed`` is for ``device_seconds``, ``census`` for ``multiprocessors``.

        The model does all at once with ``seed`` 0. With another one work waits until an event or a stream is asked for,
        and is then done in an order that the seed chooses of those that streams allow. ``fault`` makes something of the
        model fail: see ``csrc/cuda/model_runtime.h``. A real device takes no notice of both.
        """
    @property
    def copy_engine(self) -> str:
        """The call that moves large runs: ``cudaMemcpyBatchAsync``, ``cudaMemcpyAsync`` or ``memcpy``."""
    @property
    def num_sms(self) -> int:
        """Multiprocessors that a kernel uses at most: ``num_sms``, or all if the device has fewer."""
    @property
    def pci_bus_id(self) -> str:
        """The GPU's name under ``/sys/bus/pci/devices``, such as ``0000:17:00.0``; empty for the model."""
    def pack(
        self,
        pieces: npt.NDArray[np.int64],
        chunks: npt.NDArray[np.int64],
        *,
        stream: int = 0,
        copy_engine_bytes: int | None = None,
    ) -> int:
        """As ``HostPool.pack``, in one launch. Addresses are device memory or pinned host memory, in any mixture.

        ``stream`` is a ``cudaStream_t``. With ``copy_engine_bytes``, runs of whole chunks that are contiguous at
        both ends and at least that long are moved by a copy engine, on a stream of the pool's that is forked from
        ``stream`` and joined to it, while the kernel digests their source.
        The tables may be reused at once; the memory must stay until ``finish``.
        """
    def upload_pieces(self, pieces: npt.NDArray[np.int64], *, timeout_s: float = 60.0) -> None:
        """Keep rows (src_address, at, nbytes) on the device for ``pack_uploaded``.

        ``at`` is a place in a plan of the caller's, positive. Replaces the pieces uploaded before. No ticket may be
        open. ``DeviceLate`` where the upload takes longer than ``timeout_s``: then there are no uploaded pieces.
        """
    def pack_uploaded(
        self, chunks: npt.NDArray[np.int64], *, stream: int = 0, copy_engine_bytes: int | None = None
    ) -> int:
        """As ``pack``, of the uploaded pieces, so that only the chunks travel.

        ``chunks``: rows (dst_address, nbytes, first_piece, num_pieces, at), where the chunk begins at ``at`` as its
        pieces count.
        """
    def scatter(self, pieces: npt.NDArray[np.int64], *, stream: int = 0, copy_engine_bytes: int | None = None) -> int:
        """As ``HostPool.scatter``."""
    def wait(self, ticket: int, *, timeout_s: float) -> bool:
        """Whether a ticket's work is done, within this time. It stays to be finished."""
    def finish(self, ticket: int, digests: npt.NDArray[np.uint64] | None = None, *, timeout_s: float = 60.0) -> None:
        """Wait for a ticket, write its digests (one a chunk, in order) and give its slot back.

        ``DeviceError`` names rank, pieces, address ranges and device where the work failed; ``DeviceLate`` where it
        takes longer, and then the ticket stays open.
        """
    def device_seconds(self, ticket: int) -> float:
        """Seconds between begin and end of a ticket's work, by the device's clock.

        To be called after ``wait`` and before ``finish``. ``ValueError`` for work that is not done, and for a pool
        without ``timed``.
        """
    def multiprocessors(self, ticket: int) -> list[int]:
        """Numbers of the multiprocessors that ran a ticket's kernel, ascending.

        To be called after ``wait`` and before ``finish``. ``ValueError`` for work that is not done, and for a pool
        without ``census``.
        """
    def order(self, later: int, earlier: int) -> None:
        """What is enqueued on stream ``later`` from now on waits for all that is enqueued on ``earlier``."""
    def order_after(self, later: int, ticket: int) -> None:
        """The same for the work behind a ticket. A ticket that was finished is not waited for."""
    def check_spans_are_here(self, spans: npt.NDArray[np.int64]) -> None:
        """``ValueError``, with the row, for a row (address, nbytes) that is not memory of this device, nor pinned."""
    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Pinned host memory that lives as long as the array or a view of it."""
    def register(self, address: int, nbytes: int) -> Registration:
        """Pin host memory that exists already. ``DeviceError`` where the driver refuses."""
    def model_fill(self, stream: int, address: int, value: int, nbytes: int) -> None:
        """Enqueue what training might do: set ``nbytes`` bytes to ``value``. This and the next ones: model only."""
    def model_copy(self, stream: int, source: int, destination: int, nbytes: int) -> None:
        """Enqueue a copy of ``nbytes`` bytes. ``ValueError``, as from the other two, for a real device."""
    def model_sync(self, stream: int) -> None:
        """Return when all that is enqueued on a stream is done."""
