# SPDX-License-Identifier: Apache-2.0
"""How far a run has come, and with which flags: the part of a training loop's own state that a resume needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moetion.pretrain import flags


@dataclass(kw_only=True)
class Progress:
    """Counters of the loop; the data cursor is ``consumed_train_samples``."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_iterations: int = 0
    evaluated: int = -1
    """The iteration of the last evaluation."""

    def state_dict(self) -> dict[str, int]:
        """All counters by name."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put back what ``state_dict`` returned; a counter that it lacks stays."""
        for field in dataclasses.fields(self):
            if field.name in state:
                setattr(self, field.name, int(state[field.name]))


class RunState:
    """What is kept of the trainer itself: its progress, and the flags that it was started with."""

    def __init__(self, progress: Progress, record: bytes) -> None:
        self._progress = progress
        self._record = record
        self.flags_changed = ""
        """After something was loaded: a line that lists the flags that differ and act from here on."""

    @property
    def iteration(self) -> int:
        """Steps that are done."""
        return self._progress.iteration

    def state_dict(self) -> dict[str, Any]:
        """Counters by name, and the flags' record."""
        return {**self._progress.state_dict(), "flags": self._record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where this run was. ``ConfigError`` where flags differ that must not."""
        self._load(state, same_run=True)

    def load_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint on disk, this run's or another one's. ``ConfigError`` if it is of another model."""
        self._load(state, same_run=False)
        self._progress.evaluated = -1  # who loads a checkpoint to evaluate it gets an evaluation

    def _load(self, state: Mapping[str, Any], *, same_run: bool) -> None:
        if "flags" in state:  # checkpoints had none once
            self.flags_changed = flags.compare(state["flags"], self._record, same_run=same_run)
        self._progress.load_state_dict(state)
