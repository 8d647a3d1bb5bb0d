# SPDX-License-Identifier: Apache-2.0
"""Sees where an iteration's forward and backward passes begin anew, and where an optimizer step makes them count.

Megatron runs them again in three cases: its rerun state machine looks at a result twice, its paged stash has no room
for the tokens of an iteration, or a training loop does so by itself. All begin with ``zero_grad_buffer`` of the DDP
wrappers, and what came before is in no gradient any more. There is no hook on that, so from ``StepWatch(...)`` to
``close`` that method of each wrapper of this model, and no attribute of a class, is replaced by one that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_moetion.mcore.replace import replace_method


def _nothing() -> None:
    pass


class StepWatch:
    """Calls others, in the training thread, until ``close``.

    ``zeroed``: gradients are zeroed, and with them goes what passes since the last step have done; called once for each
    wrapper. ``again``: the same, and there were passes that no step had used; a replay of a whole iteration as a CUDA
    graph runs no Python and is not seen as a pass. ``stepping``: the optimizer is about to step.

    A step that a loss scaler skips runs no hook, so its passes train nothing, and a loop that zeroes gradients after
    the step is heard to run again. Without ``optimizers`` no step is seen at all: whatever passed is taken for used.
    Zeroing is then ``stepping``, if there was a pass, and neither ``zeroed`` nor ``again``.
    """

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        zeroed: Callable[[], None] = _nothing,
        again: Callable[[], None] = _nothing,
        stepping: Callable[[], None] = _nothing,
    ) -> None:
        self._zeroed, self._again, self._stepping = zeroed, again, stepping
        self._sees_steps = bool(optimizers)
        self._has_run = False
        """Whether there was a pass that neither a step has used nor a zeroing has undone."""
        with ExitStack() as undo:
            for chunk in model:
                undo.callback(chunk.register_forward_pre_hook(self._runs).remove)
                replace_method(chunk, "zero_grad_buffer", self._wrap, undo)
            for optimizer in optimizers[:1]:  # all of them step one after the other
                undo.callback(optimizer.register_step_pre_hook(self._steps).remove)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Put the methods back and remove the hooks."""
        self._undo.close()

    def _runs(self, *_: Any) -> None:
        self._has_run |= torch.is_grad_enabled()

    def _steps(self, *_: Any) -> None:
        self._has_run = False
        self._stepping()

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad_buffer(*args: Any, **named: Any) -> Any:
            has_run, self._has_run = self._has_run, False
            if self._sees_steps:
                self._zeroed()
                if has_run:
                    self._again()
            elif has_run:
                self._stepping()
            return original(*args, **named)

        return zero_grad_buffer
