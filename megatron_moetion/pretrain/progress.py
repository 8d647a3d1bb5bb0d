# SPDX-License-Identifier: Apache-2.0
"""How far a run has come: the part of a training loop's own state that a resume needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(kw_only=True)
class Progress:
    """Counters of the loop; the data cursor is ``consumed_train_samples``."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_iterations: int = 0

    def state_dict(self) -> dict[str, int]:
        """All counters by name."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put back what ``state_dict`` returned."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, int(state[field.name]))
