# SPDX-License-Identifier: Apache-2.0
"""The training state of a simulated rank: a few bytes a unit, which ``truth`` says at every iteration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moetion.framework import StepNote, TokenCounter
from megatron_moetion.sim import truth
from megatron_moetion.sim.device import NAME, Device
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

DENSE_BYTES, EXPERT_BYTES = 320, 128
HOST_BYTES = 4096
DENSE = "layers.0.dense"


def expert_name(rank: int, expert: int, num_experts: int) -> str:
    """Of one of a rank's experts; every second rank shares them."""
    return f"layers.0.experts.{rank % 2 * num_experts + expert}"


class Trainee:
    """``StateAdapter`` and ``TokenSource`` of one rank, in modes ``full`` and ``popularity``.

    ``device``: where its state lies; None: in host memory.
    """

    def __init__(
        self, rank: int, world_size: int, num_experts: int, attempt: int, device: Device | None = None
    ) -> None:
        self.device = device
        self.rank = rank
        self.attempt = attempt
        self.iteration = 0
        self.mark = truth.START
        self.is_moved = False
        """A tensor is said to have been replaced."""
        self.extra_bytes = 0
        """By which the host state has grown."""
        self._world_size = world_size
        self._experts = [expert_name(rank, e, num_experts) for e in range(num_experts)]
        sizes = {DENSE: DENSE_BYTES, "frozen": 64, **dict.fromkeys(self._experts, EXPERT_BYTES)}
        self.arrays = {name: np.zeros(n, dtype=np.uint8) for name, n in sizes.items()}
        self.counts = np.zeros(num_experts, dtype=np.int64)
        self.arrays["frozen"][:] = np.frombuffer(truth.contents(b"frozen", rank, "frozen", 64), dtype=np.uint8)
        self._fill(self.mark)

    def _fill(self, mark: bytes) -> None:
        for name, array in self.arrays.items():
            if name != "frozen":
                array[:] = np.frombuffer(truth.contents(mark, self.rank, name, array.nbytes), dtype=np.uint8)

    def compute(self) -> None:
        """The part of a training step that comes before the optimizer's."""
        self.iteration += 1
        self.mark = truth.mark_after(self.mark, self.iteration, self.attempt)

    def advance(self) -> None:
        """The optimizer's step. What it reads of a device first, such as a norm, is waited for."""
        self.settle()
        iteration, mark = self.iteration, self.mark
        self._write(lambda: self._change(iteration, mark))
        self._write(lambda: self._count(iteration))

    def settle(self) -> None:
        """Return when the arrays have what training has written."""
        if self.device is not None:
            self.device.settle()

    def _write(self, call: Callable[[], None]) -> None:
        if self.device is not None:
            self.device.train(call)
        else:
            call()

    def _change(self, iteration: int, mark: bytes) -> None:
        self._fill(mark)

    def _count(self, iteration: int) -> None:
        for expert in range(len(self._experts)):
            self.counts[expert] += truth.tokens(self.rank, iteration, expert)

    def load(self, iteration: int, mark: bytes, arrays: Mapping[str, bytes], counts: Sequence[int]) -> None:
        """From a checkpoint on disk."""
        self.iteration, self.mark = iteration, mark
        for name, data in arrays.items():
            self.arrays[name][:] = np.frombuffer(data, dtype=np.uint8)
        self.counts[:] = counts

    # -- StateAdapter ----------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """See ``StateAdapter``."""
        counts = _region(DENSE, "counts", self.counts, Role.BUFFER, at_once=True)
        units = [self._unit(DENSE, UnitKind.DENSE, counts), self._unit("frozen", UnitKind.FROZEN)]
        units += [self._unit(name, UnitKind.EXPERT) for name in self._experts]
        units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=HOST_BYTES))
        return Inventory(units=tuple(units))

    def _unit(self, name: str, kind: UnitKind, *more: Region) -> Unit:
        number = int(name.rpartition(".")[2]) if kind is UnitKind.EXPERT else None
        role = Role.WEIGHT if kind is UnitKind.FROZEN else Role.MASTER
        regions = (_region(name, "weight", self.arrays[name], role), *self._more_of(name), *more)
        if self.device is not None:
            regions = tuple(replace(region, device=NAME) for region in regions)
        return Unit(name=name, kind=kind, layer=None if name == "frozen" else 0, expert=number, regions=regions)

    def _more_of(self, name: str) -> tuple[Region, ...]:
        return ()

    def moved(self) -> str | None:
        """See ``StateAdapter``."""
        return "the tensor 'weight' was replaced" if self.is_moved else None

    def expert_peers(self) -> tuple[int, ...]:
        """See ``StateAdapter``."""
        return tuple(range(self.rank % 2, self._world_size, 2))

    def host_state(self) -> dict[str, Any]:
        """See ``StateAdapter``."""
        return {"iteration": self.iteration, "mark": self.mark, "ballast": bytes(self.extra_bytes)}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """See ``StateAdapter``."""
        self.iteration, self.mark = int(state["iteration"]), bytes(state["mark"])

    def after_step(self) -> None:
        """See ``StateAdapter``."""

    def state_hash(self) -> str:
        """See ``StateAdapter``."""
        return hashlib.blake2b(b"".join(a.tobytes() for a in self.arrays.values()), digest_size=16).hexdigest()

    def copy_to_model(self) -> None:
        """See ``StateAdapter``."""

    def resync(self) -> None:
        """See ``StateAdapter``."""

    # -- TokenSource -----------------------------------------------------------------------------------

    def token_counters(self) -> tuple[TokenCounter, ...]:
        """See ``TokenSource``."""
        return tuple(
            TokenCounter(expert=name, unit=DENSE, tensor="counts", position=e) for e, name in enumerate(self._experts)
        )

    def counts_tokens(self) -> bool:
        """See ``TokenSource``."""
        return True

    def routed_tokens(self) -> Mapping[str, int]:
        """See ``TokenSource``."""
        return {}

    def layer_tokens(self) -> Mapping[str, Mapping[str, float]]:
        """See ``TokenSource``."""
        return {}

    def capacity_problem(self) -> str | None:
        """See ``TokenSource``."""
        return None

    def recalibrate(self, lost: Mapping[str, int]) -> None:
        """See ``TokenSource``."""


class Descender(Trainee):
    """``StepReplayer`` too: state follows from gradients, for mode ``exact``."""

    def __init__(
        self, rank: int, world_size: int, num_experts: int, attempt: int, device: Device | None = None
    ) -> None:
        super().__init__(rank, world_size, num_experts, attempt, device)
        self._gradients = {name: np.zeros_like(a) for name, a in self.arrays.items() if name != "frozen"}
        self._told: list[int] = []
        self._remembered = 1
        self._steps_taken = 0

    def compute(self) -> None:
        """See ``Trainee``: all gradients are there then."""
        super().compute()
        iteration, mark = self.iteration, self.mark
        self._write(lambda: self._derive(iteration, mark))
        self._told.append(iteration)
        self._steps_taken += 1

    def _derive(self, iteration: int, mark: bytes) -> None:
        for name, array in self._gradients.items():
            array[:] = np.frombuffer(truth.gradient(mark, self.rank, name, array.nbytes, iteration), dtype=np.uint8)

    def _change(self, iteration: int, mark: bytes) -> None:
        self._step(iteration)

    def _step(self, iteration: int) -> None:
        if not truth.is_skipped(iteration):
            for name, gradient in self._gradients.items():
                words = self.arrays[name].view(np.uint32)
                words *= np.uint32(3)
                words += gradient.view(np.uint32)

    def _more_of(self, name: str) -> tuple[Region, ...]:
        if name not in self._gradients:
            return ()
        return (_region(name, "weight", self._gradients[name], Role.GRAD, at_once=True),)

    def host_state(self) -> dict[str, Any]:
        """See ``StateAdapter``."""
        return {**super().host_state(), "told": self._told[-self._remembered :]}

    # -- StepReplayer ----------------------------------------------------------------------------------

    @property
    def bytes_a_step(self) -> int:
        """See ``StepReplayer``."""
        return 16

    def remember(self, steps: int) -> None:
        """See ``StepReplayer``."""
        self._remembered = steps

    def note_step(self, iteration: int, *, stepped: bool) -> StepNote:
        """See ``StepReplayer``."""
        taken, self._steps_taken = self._steps_taken, 0
        return StepNote(skipped=truth.is_skipped(iteration), problem=None if taken == 1 else f"{taken} steps")

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        """See ``StepReplayer``."""
        self._told = [int(i) for i in state["told"]]

    def replay(self, iteration: int) -> bool:
        """See ``StepReplayer``."""
        assert iteration in self._told, f"the inputs of iteration {iteration} are not known: {self._told}"
        self._step(iteration)
        return not truth.is_skipped(iteration)


def _region(unit: str, tensor: str, array: npt.NDArray[Any], role: Role, *, at_once: bool = False) -> Region:
    return Region(
        unit=unit,
        tensor=tensor,
        role=role,
        dtype="int64" if tensor == "counts" else "float32",
        start=0,
        nbytes=array.nbytes,
        address=array.ctypes.data,
        at_once=at_once,
    )
