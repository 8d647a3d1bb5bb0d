# SPDX-License-Identifier: Apache-2.0
"""One rank's run of Megatron-LM's ``pretrain()`` with in-memory checkpoints, as wrappers around functions of its loop.

Each method named after such a function takes the original and the arguments of the call. Without ``--moetion`` it only
passes them on. The runtime is imported when the model is set up, and not before.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from operator import and_
from types import ModuleType
from typing import Any

import torch

from megatron_moetion.errors import ConfigError, shared
from megatron_moetion.mcore.arguments import moetion_config
from megatron_moetion.megatron_lm.flags import newest_on_disk, refuse, takes_part
from megatron_moetion.pretrain.flags import compare, record
from megatron_moetion.pretrain.process import Process
from megatron_moetion.rendezvous import fresh_store, open_store, replacement_warning

_logger = logging.getLogger("megatron_moetion")


class LoopState:
    """What Megatron-LM's loop keeps beside model, optimizer and scheduler: the ``user_state`` of its run."""

    COUNTERS = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")

    def __init__(self, training: ModuleType) -> None:
        self._training = training
        self.iteration = 0
        """Iterations that are done."""
        self.operations: float = 0
        """Floating-point operations so far, by Megatron's count."""
        self.has_loaders = False
        """Whether the data loaders were built, which draw random numbers. Only a baseline is older than they are."""
        self.flags_changed = ""
        """After a recovery: a line that lists the flags that differ from those of the last start and act from here on.
        """
        self._record = b""

    def note_flags(self) -> None:
        """Remember the flags of this start, which the next one is compared with."""
        self._record = record(self._training.get_args())

    def read_flags(self) -> None:
        """Take over the iteration and the count that Megatron keeps among its flags until the loop runs."""
        flags = self._training.get_args()
        self.iteration, self.operations = flags.iteration, flags.num_floating_point_operations_so_far

    def megatron_flags(self) -> Mapping[str, Any]:
        """All of Megatron's flags."""
        found: dict[str, Any] = vars(self._training.get_args())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Numbers by name, and the flags' record."""
        flags = self._training.get_args()
        return {
            "flags": self._record,
            "iteration": self.iteration,
            "operations": self.operations,
            "has_loaders": self.has_loaders,
            **{name: getattr(flags, name) for name in self.COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned, where Megatron's loop begins with it; the batch size follows.

        ``ConfigError`` where flags differ that must not.
        """
        self.flags_changed = compare(state["flags"], self._record, same_run=True)
        flags = self._training.get_args()
        for name in self.COUNTERS:
            setattr(flags, name, state[name])
        flags.iteration, flags.num_floating_point_operations_so_far = state["iteration"], state["operations"]
        self.has_loaders = state["has_loaders"]
        self.read_flags()
        self._training.update_num_microbatches(
            consumed_samples=flags.consumed_train_samples, consistency_check=False, verbose=False
        )


class Adapter:
    """Wraps one process's calls of ``training``, the module ``megatron.training.training``.

    ``attach`` is that of the package, and taken from there where it is not given.
    """

    def __init__(self, training: ModuleType, attach: Callable[..., Any] | None = None) -> None:
        self._training = training
        self._attach = attach
        self._attached: Any = None
        self._state = LoopState(training)
        self._random: dict[str, Any] | None = None
        """The generators' states that training goes on with."""
        self._skipped = False
        """An iteration was skipped, and its samples are not counted yet."""
        self._is_healthy = True
        self._is_leaving = False
        """Megatron has decided, on all ranks alike, to leave after this iteration."""
        self._saves_again = False
        self._left_to_memory = -1
        """The last iteration whose checkpoint was left to the processes beside training."""
        self._gave_communicator = False

    # -- before training ------------------------------------------------------------------------------

    def initialize_distributed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse what cannot work; then ranks meet over a store that a restart finds empty, with every launcher."""
        flags = self._training.get_args()
        try:
            if not takes_part(flags):
                return original(*args, **kwargs)
            refuse(flags)
        except ConfigError as error:
            raise shared(error) from None  # all ranks have the same flags
        call = inspect.signature(original).bind(*args, **kwargs)
        if call.arguments.get("store") is None and not torch.distributed.is_initialized():
            process = Process.from_environment(os.environ)
            timeout = timedelta(minutes=flags.distributed_timeout_minutes)
            store = open_store(os.environ, process.rank, process.world_size, timeout)
            call.arguments["store"], _ = fresh_store(store, os.environ, process.rank, process.world_size, timeout)
            if process.rank == 0 and (warning := replacement_warning(os.environ)):
                _logger.warning("[moetion] rank 0: %s", warning)
        return original(*call.args, **call.kwargs)

    def setup_model_and_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Set up without loading; then memory or disk is recovered from, whichever is newer."""
        flags = self._training.get_args()
        if not takes_part(flags):
            return original(*args, **kwargs)
        with DeferredLoad(self._training) as deferred:
            model, optimizer, scheduler = original(*args, **kwargs)
        if optimizer is None:
            raise ConfigError("Megatron-LM has made no optimizer, so there is nothing to recover: leave out --moetion")
        self._start(flags, deferred, model, optimizer, scheduler)
        return model, optimizer, scheduler

    def _start(self, flags: Any, deferred: DeferredLoad, model: Any, optimizer: Any, scheduler: Any) -> None:
        if self._attach is None:
            from megatron_moetion.mcore.attach import attach

            self._attach = attach

        def load() -> int | None:
            if deferred.call is None:
                return None
            flags.iteration, flags.num_floating_point_operations_so_far = deferred.call()
            self._state.read_flags()
            # A checkpoint of this training was saved with its loaders built; one to begin from was not.
            self._state.has_loaders = flags.iteration > 0
            return flags.iteration or None

        self._state.read_flags()
        self._state.note_flags()
        attached = self._attach(
            model=model,
            optimizer=optimizer,
            opt_param_scheduler=scheduler,
            config=moetion_config(flags),
            user_state=self._state,
        )
        try:
            resumed = attached.start(load_persistent=load, newest_persistent=partial(newest_on_disk, flags))
            if resumed is not None:
                from megatron_moetion.megatron_lm.rerun import take_over

                fabric = attached.session.running.fabric
                take_over(flags, resumed.iteration, lambda here: bool(fabric.reduce(here, and_)))
        except BaseException:
            attached.abandon()
            raise
        if self._state.flags_changed and Process.from_environment(os.environ).rank == 0:
            _logger.warning("[moetion] rank 0: %s", self._state.flags_changed)
        self._attached = attached
        self._saves_again = resumed is not None
        if self._state.has_loaders:
            from megatron_moetion.mcore.rng import rng_states

            self._random = rng_states()

    # -- training -------------------------------------------------------------------------------------

    def train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train with the generators as they were, and close the run however training ends."""
        if self._attached is None:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs)
        if self._random is not None:  # data loaders have drawn from them since
            from megatron_moetion.mcore.rng import load_rng_states

            load_rng_states(self._random)
            self._random = None
        self._state.has_loaders = True
        if self._takes_communicator(original) and call.arguments.get("p2p_communicator") is None:
            arguments = self._attached.pipeline_arguments  # empty where mode auto has not chosen yet
            self._gave_communicator = bool(arguments)
            call.arguments.update(arguments)
        try:
            if self._saves_again:
                self._save_if_due(call.arguments)
            result = original(*call.args, **call.kwargs)
        except BaseException as error:
            if not (self._is_leaving and isinstance(error, SystemExit)):
                self._attached.abandon()  # perhaps the other ranks go on, and wait for this one
                self._attached = None
                raise
            result = error
        self._tell_skipped()
        attached, self._attached = self._attached, None
        if isinstance(result, SystemExit) and result.code:  # the job is to be started again, and needs its memory
            attached.drain()
            attached.abandon()
        else:
            attached.close()
            if self._left_to_memory == self._state.iteration:  # no later iteration has shown that all ranks have it
                self._save_unless_saved(call.arguments)
        if isinstance(result, SystemExit):
            raise result
        return result

    def _save_if_due(self, loop: Mapping[str, Any]) -> None:
        """Write the checkpoint of a recovered iteration, which the fault may have cut short: its snapshot is older."""
        flags, iteration = self._training.get_args(), self._state.iteration
        is_due = flags.save and flags.save_interval and iteration and not iteration % flags.save_interval
        if is_due and not self._attached.writes_checkpoints:
            self._save_unless_saved(loop)

    def _save_unless_saved(self, loop: Mapping[str, Any]) -> None:
        flags, iteration = self._training.get_args(), self._state.iteration
        from megatron_moetion.pretrain.checkpoint import last_saved

        if last_saved(flags.save) != iteration:
            self._training.save_checkpoint(
                iteration,
                loop["model"],
                loop["optimizer"],
                loop["opt_param_scheduler"],
                self._state.operations,
                checkpointing_context=loop["checkpointing_context"],
                train_data_iterator=loop["train_data_iterator"],
            )

    def save_checkpoint_and_time(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Leave the checkpoints of ``--save-interval`` to the processes beside training, where there are such."""
        if self._attached is not None and self._attached.writes_checkpoints and not self._is_leaving:
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            interval = self._training.get_args().save_interval
            if interval and not call["iteration"] % interval and not call.get("non_persistent_ckpt"):
                self._left_to_memory = call["iteration"]
                return None
        return original(*args, **kwargs)

    def get_forward_backward_func(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Give schedules the communicator that is watched, where ``train()`` was not given it."""
        schedule = original(*args, **kwargs)
        if self._attached is None or self._gave_communicator:
            return schedule

        def watched(**step: Any) -> Any:
            more = self._attached.pipeline_arguments if self._attached is not None else {}
            return schedule(**{**step, **more})

        return watched

    @staticmethod
    def _takes_communicator(train: Callable[..., Any]) -> bool:
        return {"p2p_communicator", "pg_collection"} <= inspect.signature(train).parameters.keys()

    def train_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember whether losses and gradients of the step were finite."""
        self._tell_skipped()
        result = original(*args, **kwargs)
        if self._attached is not None:
            self._is_healthy = is_healthy(losses=result[0], skipped=bool(result[1]), grad_norm=result[5])
            self._is_leaving = bool(result[3])
        return result

    def dummy_train_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An iteration of ``--iterations-to-skip``: Megatron counts its samples after this call."""
        self._tell_skipped()
        result = original(*args, **kwargs)
        self._skipped = self._attached is not None
        return result

    def _tell_skipped(self) -> None:
        """The end of an iteration without a step, once Megatron has counted it."""
        if self._skipped:
            self._skipped = False
            self._state.iteration += 1
            self._attached.on_step_end(self._state.iteration, stepped=False)

    def checkpoint_and_decide_exit(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The end of an iteration, behind its evaluation, and before training may save and leave."""
        if self._attached is not None:
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            self._state.iteration = call["iteration"]
            self._state.operations = call["num_floating_point_operations_so_far"]
            self._attached.on_step_end(self._state.iteration, healthy=self._is_healthy)
        decided = original(*args, **kwargs)
        self._is_leaving = bool(decided)
        return decided


class DeferredLoad:
    """While it is entered, ``load_checkpoint`` loads nothing and remembers how it was called."""

    def __init__(self, training: ModuleType) -> None:
        self._training: Any = training
        self._original: Callable[..., Any] = training.load_checkpoint
        self.call: Callable[[], tuple[int, float]] | None = None
        """What loads after all, and returns the iteration and the count of operations; None if nothing was asked for.
        """

    def __enter__(self) -> DeferredLoad:
        self._training.load_checkpoint = self._remember
        return self

    def __exit__(self, *exc: object) -> None:
        self._training.load_checkpoint = self._original

    def _remember(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.call = partial(self._original, *args, **kwargs)
        return 0, 0


def is_healthy(*, losses: Mapping[str, Any], skipped: bool, grad_norm: Any) -> bool:
    """Whether losses and gradients are finite. Where a loss scaler skipped the step, the state is as before it."""
    numbers = [*losses.values(), *([] if skipped or grad_norm is None else [grad_norm])]
    return all(bool(torch.isfinite(torch.as_tensor(number)).all()) for number in numbers)
