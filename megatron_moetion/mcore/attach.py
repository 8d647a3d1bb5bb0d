# SPDX-License-Identifier: Apache-2.0
"""Ties MoEtion to a Megatron-Core training loop, with hooks that ``close`` removes."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_moetion.config import MoetionConfig, flag_of, resolved_schedule
from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.auto import Choosing, choosing
from megatron_moetion.mcore.device_notes import (
    check_graphs,
    connections_note,
    dispatcher_note,
    graph_note,
    graph_settings,
    padding_note,
    schedule_with_graphs,
    stash_note,
)
from megatron_moetion.mcore.versions import import_problem, installed, require_names, version_note
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.modes.mode import Blueprint
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.observe.trace import Trace, trace_name
from megatron_moetion.recover.capacity import CapacityRules
from megatron_moetion.recover.disk import Disk
from megatron_moetion.rendezvous import replacement_warning, restart_warning
from megatron_moetion.replicate.addresses import job_store
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.witness import NO_WITNESS, Witness, witness_of
from megatron_moetion.run.host import Host
from megatron_moetion.run.network import Network
from megatron_moetion.run.prepare import Claimed, claim, settle
from megatron_moetion.run.running import Prepared
from megatron_moetion.run.starter import Resumed, Starter
from megatron_moetion.run.trial import agreed_mode
from megatron_moetion.schedule.pace import spread_share
from megatron_moetion.schedule.recorder import EventStopwatch, HostStopwatch
from megatron_moetion.schedule.scheduler import Draw, Scheduler, no_drawing
from megatron_moetion.select.book import ExpertState
from megatron_moetion.session import Session
from megatron_moetion.store.node import restart_count, run_id_of

try:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.utils import get_model_config

    from megatron_moetion.mcore.chain import chain
    from megatron_moetion.mcore.refusals import refuse_sharded_wrappers
    from megatron_moetion.mcore.state import MegatronState, Stateful, is_megatrons
    from megatron_moetion.mcore.step_watch import StepWatch
    from megatron_moetion.mcore.topology import topology
    from megatron_moetion.mcore.traffic import TimedCommunicator, TrafficHooks, elsewhere
except ImportError as error:
    raise ImportError(import_problem(error), name=error.name, path=error.path) from error

EXIT_WAIT_S = 5.0
"""What a process that ends without ``close`` gives its last snapshots to become whole."""
_logger = logging.getLogger("megatron_moetion")


class NoState:
    """The user state of a loop that has none beyond the iteration, which ``Resumed`` tells."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class InMode(NamedTuple):
    """A run whose mode is known: its sizes are settled, and its state is hooked."""

    prepared: Prepared
    state: MegatronState


class Attached:
    """A run tied to a Megatron loop: call ``start`` once, ``on_step_end`` after each iteration, then ``close``.

    As a context manager it closes itself, after an exception without waiting for other ranks. A process that ends
    without ``close`` does what it can in a few seconds, and says so.
    """

    def __init__(self, loop: Loop, run: InMode | Choosing, undo: ExitStack) -> None:
        """Takes over what ``undo`` holds: it undoes all that ``attach`` did, the run itself aside."""
        self._loop = loop
        self._choosing = run if isinstance(run, Choosing) else None
        self._run = run if isinstance(run, InMode) else None
        self._session: Session | None = None
        self.pipeline_arguments: dict[str, Any] = {}
        """After ``start``: what to pass to Megatron's schedule, so that its traffic is seen.

        Empty where nothing is to be seen, and where ``attach`` was given the schedule's communicator.
        """
        atexit.register(self._at_exit)
        undo.callback(atexit.unregister, self._at_exit)
        self._undo = undo.pop_all()

    def start(
        self,
        load_persistent: Callable[[], int | None] | None = None,
        newest_persistent: Callable[[], int | None] | None = None,
    ) -> Resumed | None:
        """Recover the newest state from memory or disk, or begin; then a baseline is stable. Collective.

        ``load_persistent`` loads the newest checkpoint on disk and returns its iteration, or None if there is none.
        ``newest_persistent`` returns that iteration without loading anything: where it is newer than what memory holds,
        disk wins. Without it, disk is asked only when memory holds nothing. Returns what was recovered from memory,
        None otherwise. For errors see ``Starter.start``. From here on training's traffic is watched, if snapshots or
        a trace depend on it.

        In mode ``auto`` a run that has nothing to lose yet begins here without a baseline. It comes with the choice,
        some iterations later, in ``on_step_end``.
        """
        if self._choosing is not None:
            if self._choosing.is_first:
                self.pipeline_arguments = self._choosing.begin(load_persistent)
                return None
            self._settle(self._choosing)
        state = self._in_mode().state
        state.loaded()  # by the loop, since attach

        def load() -> int | None:
            iteration = load_persistent() if load_persistent is not None else None
            state.loaded()
            return iteration

        return self._start(Disk(load=load if load_persistent is not None else None, newest=newest_persistent))

    def _settle(self, choosing: Choosing) -> None:
        """Choose the mode of this run. Collective."""
        self._run = choosing.settle(self._undo)
        self._choosing = None

    def _start(self, disk: Disk) -> Resumed | None:
        prepared, state = self._in_mode()
        running, resumed = Starter(prepared).start(disk)
        session = self._session = Session(running)
        for optimizer in state.inner_optimizers():
            handle = optimizer.register_step_pre_hook(lambda *_: session.before_optimizer_step())
            self._undo.callback(handle.remove)
        if self.scheduler.draws or (self.scheduler.needs_windows and running.coding.holders):
            given = self.pipeline_arguments.get("p2p_communicator")
            found = self._loop.watch(self.scheduler, running.node_of, self._undo, given)
            self.pipeline_arguments = self.pipeline_arguments or found
        return resumed

    def restore_rng(self) -> None:
        """Put the random generators back to where ``start`` recovered them. Talks to no other rank.

        For a loop that builds what draws random numbers after ``start``: a ``DataLoader``'s iterator, for instance,
        draws a seed from torch's generator. Call it once, when the loop is ready for its first iteration. It changes
        nothing where nothing was recovered, or where the run had not finished an iteration: its generators are where
        the same draws took them in the first start. ``ConfigError`` before ``start``.
        """
        if self._session is not None:
            self._in_mode().state.restore_rng()
        elif self._choosing is None or not self._choosing.has_begun:
            raise ConfigError("call start() before restore_rng()")

    @property
    def scheduler(self) -> Scheduler:
        """This rank's; ``ConfigError`` before mode ``auto`` has chosen."""
        return self._in_mode().prepared.scheduler

    @property
    def session(self) -> Session:
        """What runs since ``start``; ``ConfigError`` before, and before mode ``auto`` has chosen."""
        self._in_mode()
        if self._session is None:
            raise ConfigError("call start() before on_step_end()")
        return self._session

    def _in_mode(self) -> InMode:
        if self._run is None:
            raise ConfigError("mode auto has not chosen yet, so there is no session")
        return self._run

    def on_step_end(self, iteration: int, *, healthy: bool = True, stepped: bool = True) -> None:
        """See ``Session.on_step_end``; before mode ``auto`` has chosen it comes one iteration nearer to that."""
        if self._choosing is not None:
            if self._choosing.step_end(iteration, healthy=healthy, stepped=stepped):
                self._settle(self._choosing)
                self._in_mode().state.has_trained = True
                self._start(Disk(load=lambda: iteration))  # what the loop has come to is the baseline
            return
        self._in_mode().state.has_trained = True
        self.session.on_step_end(iteration, healthy=healthy, stepped=stepped)

    def experts(self) -> tuple[ExpertState, ...]:
        """See ``Session.experts``; empty before there is a session."""
        return self._session.experts() if self._session is not None else ()

    def drain(self) -> None:
        """See ``Session.drain``; before ``start`` there is nothing to wait for."""
        if self._session is not None:
            self._session.drain()

    def scalars(self) -> dict[str, float]:
        """See ``Session.scalars``; empty before there is a session."""
        return self._session.scalars() if self._session is not None else {}

    @property
    def stable_iteration(self) -> int:
        """See ``Session.stable_iteration``; -1 before there is a session."""
        return self._session.stable_iteration if self._session is not None else -1

    @property
    def writes_checkpoints(self) -> bool:
        """See ``Session.writes_checkpoints``; False before ``start``."""
        return self._session is not None and self._session.writes_checkpoints

    def close(self) -> None:
        """Finish the snapshots under way and undo everything that ``attach`` did; see ``Session.close``."""
        if sys.exc_info()[0] is not None:
            self.abandon()
            return
        with self._undo:
            if self._session is not None:
                self._session.close()
            elif self._run is not None:
                self._run.prepared.close()
            elif self._choosing is not None:
                self._choosing.close()

    def abandon(self, wait_s: float = 0.0) -> bool:
        """See ``Session.abandon``; everything that ``attach`` did is undone."""
        with self._undo:
            if self._session is not None:
                return self._session.abandon(wait_s)
            if self._run is not None:
                self._run.prepared.abandon()
            elif self._choosing is not None:
                self._choosing.abandon()
            return True

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _at_exit(self) -> None:
        """The interpreter ends and nobody called ``close``."""
        if "last_value" in vars(sys):  # by an exception: a supervisor waits for this process to be gone
            self.abandon()
            return
        _logger.warning(
            "[moetion] rank %d: the loop ended without session.close(); %s",
            torch.distributed.get_rank() if torch.distributed.is_initialized() else -1,
            f"its last snapshots get {EXIT_WAIT_S:.0f} s" if self._session is not None else "there is no snapshot",
        )
        self.abandon(EXIT_WAIT_S)


def attach(
    *,
    model: DistributedDataParallel | Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler | Stateful | None,
    config: MoetionConfig,
    user_state: Stateful | None = None,
    p2p_communicator: TimedCommunicator | None = None,
) -> Attached:
    """Prepare in-memory checkpointing; collective over all ranks.

    ``model`` is the DDP-wrapped model, or the list of its chunks, ``optimizer`` what ``get_megatron_optimizer``
    returned for them. ``opt_param_scheduler`` is Megatron's, or any object with ``state_dict`` and ``load_state_dict``;
    with None nobody carries the state of a scheduler. ``user_state`` is the loop's own state (data position, consumed
    samples). ``p2p_communicator`` is that of ``pipeline_arguments``, where the schedule or ``pretrain()`` was given it
    before there was a model. Call ``attach`` after model parallelism and the random seeds are set up and before the
    first step. Raises ``MoetionError`` subclasses, on all ranks the same, for settings and models that cannot be
    captured exactly; then nothing stays hooked.
    """
    if isinstance(model, DistributedDataParallel):
        model = [model]
    check_attach_arguments(model, optimizer, opt_param_scheduler, config, user_state, p2p_communicator)
    host = Host()
    loop = Loop(model, optimizer, opt_param_scheduler, user_state, p2p_communicator)
    with ExitStack() as undo, ExitStack() as unless_attached:
        show_log(undo)
        _say_once(
            version_note(installed()),
            restart_warning(host.environment) if torch.distributed.get_rank() == 0 else None,  # asks the store
            replacement_warning(host.environment),
        )
        fabric = _connect(config, host)
        unless_attached.callback(fabric.close)
        witness = on_all_ranks(fabric, lambda: _witness(config, fabric.rank, host.environment))
        attached = tie(loop, claim(config=config, fabric=fabric, witness=witness, host=host), undo)
        unless_attached.pop_all()
        return attached


def tie(loop: Loop, claimed: Claimed, undo: ExitStack) -> Attached:
    """Attach in the only mode that settings allow, in that of the run's arenas, or in one that is still to be chosen.

    Collective; takes over ``claimed`` and what ``undo`` holds. After an error nothing of ``claimed`` stays open.
    """
    with ExitStack() as unless_tied:
        unless_tied.callback(claimed.close)
        config, fabric = claimed.config, claimed.fabric
        mode, *others = config.allowed_modes
        if others:
            found, _ = on_all_ranks(fabric, claimed.node.mode_found)
            mode = agreed_mode(fabric, found)
        run = loop.attach(config.in_mode(mode), claimed, undo) if mode else choosing(loop, claimed)
        unless_tied.pop_all()
        return Attached(loop, run, undo)


def _connect(config: MoetionConfig, host: Host) -> SocketFabric:
    interface, setting = _interface(config, host.environment)
    return SocketFabric.connect(
        store=job_store(host.environment),
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        ranks_per_host=int(host.environment.get("LOCAL_WORLD_SIZE", 1)),
        timeout_s=config.timeout_s,
        in_flight_bytes=config.in_flight_bytes,
        clock=host.clock,
        threads=host.threads,
        interface=interface,
        interface_setting=setting,
        master=host.environment.get("MASTER_ADDR", ""),
    )


@dataclass(frozen=True, eq=False)
class Loop:
    """What ``attach`` is given of a training loop."""

    model: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    opt_param_scheduler: OptimizerParamScheduler | Stateful | None
    user_state: Stateful | None
    communicator: TimedCommunicator | None
    initial_settings: dict[str, Any] = field(default_factory=dict)
    """Of the first state that was made, before training: mode ``auto`` makes another one later."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model[0].parameters()).device

    @property
    def graphs(self) -> dict[str, Any]:
        """See ``graph_settings``."""
        return graph_settings(get_model_config(self.model[0]))

    def free_device_bytes(self) -> int | None:
        """Memory that this rank's GPU has left; None without one."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def attach(
        self, config: MoetionConfig, claimed: Claimed, undo: ExitStack, network: Network | None = None
    ) -> InMode:
        """In the mode of ``config``, with hooks that ``undo`` removes. Collective; see ``settle``."""
        host, fabric = claimed.host, claimed.fabric
        model_config = get_model_config(self.model[0])
        check_graphs(self.graphs, recalibrates=config.recalibrates)
        _say_once(
            graph_note(self.graphs, self._schedule(config)),
            dispatcher_note(model_config),
            stash_note(model_config),
            padding_note(model_config, counts_tokens=config.mode == "popularity"),
            connections_note(host.environment) if self.device.type == "cuda" else None,
        )
        trace = _trace(config, host.environment) if config.trace_dir else None
        scheduler = self.scheduler(config, host, trace.add if trace is not None else no_drawing)

        def make_state() -> tuple[MegatronState, Blueprint]:
            state, blueprint = self.state(config)
            undo.callback(state.close)  # also where it fails on another rank
            return state, blueprint

        state, blueprint = on_all_ranks(fabric, make_state)
        prepared = settle(
            claimed,
            config,
            adapter=state,
            blueprint=blueprint,
            topology=topology(),
            scheduler=scheduler,
            network=network,
        )
        with ExitStack() as unless_traced:
            unless_traced.callback(prepared.close)
            if trace is not None:  # the folder of the run is ours by now
                undo.callback(trace.close)
                on_all_ranks(fabric, trace.open)
            unless_traced.pop_all()
        return InMode(prepared, state)

    def scheduler(self, config: MoetionConfig, host: Host, draw: Draw = no_drawing) -> Scheduler:
        """One for this model and this machine."""
        is_capturing = torch.cuda.is_current_stream_capturing if self.graphs else None
        on_device = self.device.type == "cuda"
        return Scheduler(
            schedule_with_graphs(self._schedule(config), self.graphs),
            EventStopwatch(torch.cuda.Event, is_capturing) if on_device else HostStopwatch(host.clock),
            clock=host.clock,
            condition=host.threads.condition(),
            eager_slice_bytes=max(1 << 16, min(8 << 20, config.in_flight_bytes // 8)),
            draw=draw,
            is_waited_for=config.mode == "exact",
            packing_share=spread_share(config.replicas) if on_device else 0.0,
        )

    def _schedule(self, config: MoetionConfig) -> str:
        return resolved_schedule(config.schedule, on_device=self.device.type == "cuda")

    def watch(
        self,
        scheduler: Scheduler,
        node_of: Sequence[int],
        undo: ExitStack,
        communicator: TimedCommunicator | None = None,
    ) -> dict[str, Any]:
        """Have the scheduler hear of training's traffic until ``undo``; see ``TrafficHooks.pipeline_arguments``.

        ``communicator``: what the schedule was given since ``attach``.
        """
        traffic = TrafficHooks(
            self.model,
            scheduler.recorder,
            elsewhere(node_of, torch.distributed.get_rank()),
            sees_all=scheduler.draws,
            communicator=communicator or self.communicator,
        )
        undo.callback(traffic.close)
        optimizers = [link.optimizer for link in chain(self.optimizer)]
        undo.callback(StepWatch(self.model, optimizers, again=scheduler.run_again).close)
        return traffic.pipeline_arguments

    def state(self, config: MoetionConfig) -> tuple[MegatronState, Blueprint]:
        """The state that the mode needs to be told of, and the mode's blueprint. Raises where it cannot be captured."""
        scheduler = self.opt_param_scheduler
        require_names(self.model, self.optimizer, scheduler if is_megatrons(scheduler) else None)
        state, blueprint = _state(self.model, self.optimizer, scheduler, config, self.user_state)
        if not self.initial_settings:
            self.initial_settings.update(state.initial_settings)
        state.initial_settings = self.initial_settings
        return state, blueprint


def _interface(config: MoetionConfig, environment: Mapping[str, str]) -> tuple[str, str]:
    """The interface that settings name, and which setting does."""
    if config.network_interface:
        return config.network_interface, flag_of("moetion_network_interface")
    return environment.get("GLOO_SOCKET_IFNAME", ""), "GLOO_SOCKET_IFNAME"


def _say_once(*notes: str | None) -> None:
    """Log notes on settings that are the same on all ranks."""
    if torch.distributed.get_rank() == 0:
        for note in filter(None, notes):
            _logger.warning("[moetion] rank 0: %s", note)


def _state(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler | Stateful | None,
    config: MoetionConfig,
    user_state: Stateful | None,
) -> tuple[MegatronState, Blueprint]:
    """The state that the mode needs to be told of, and the mode's blueprint."""
    make = partial(
        MegatronState,
        model=model,
        optimizer=optimizer,
        scheduler=opt_param_scheduler,
        user_state=user_state if user_state is not None else NoState(),
    )
    match config.mode:
        case "full":
            return make(), FullBlueprint()
        case "popularity":
            capacity = CapacityRules(iterations=config.recalibration_iterations) if config.recalibrates else None
            state = make(count_tokens=True, capacity=capacity)
            assert state.tokens is not None, "made with count_tokens"
            return state, PopularityBlueprint(state.tokens)
        case "exact":
            state = make(log_steps=True)
            assert state.step_log is not None, "made with log_steps"
            return state, ExactBlueprint(state.step_log)
        case mode:
            raise AssertionError(f"mode {mode!r} has no blueprint")


def _witness(config: MoetionConfig, rank: int, environment: Mapping[str, str]) -> Witness:
    """Rank 0's; nobody else is asked, so nobody else connects."""
    run_id = run_id_of(config, environment)
    return witness_of(environment, run_id) if rank == 0 else NO_WITNESS


def check_attach_arguments(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler | Stateful | None,
    config: MoetionConfig,
    user_state: Stateful | None,
    p2p_communicator: TimedCommunicator | None = None,
) -> None:
    """Raise ``ConfigError`` where an argument of ``attach`` is not what it should be."""
    if not torch.distributed.is_initialized() or not parallel_state.model_parallel_is_initialized():
        raise ConfigError("attach() comes after init_process_group() and parallel_state.initialize_model_parallel()")
    if isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"attach(model=...) is a {type(model).__name__}; give the model that is wrapped in Megatron's "
            f"DistributedDataParallel, or the list of such chunks"
        )
    if not model:
        raise ConfigError("attach(model=...) holds nothing; give the model chunks of this rank")
    refuse_sharded_wrappers(model)
    if not isinstance(optimizer, MegatronOptimizer):
        raise ConfigError(
            f"attach(optimizer=...) is a {type(optimizer).__name__}; give what "
            f"megatron.core.optimizer.get_megatron_optimizer returned"
        )
    if missing := _missing_of_state(opt_param_scheduler):
        raise ConfigError(
            f"attach(opt_param_scheduler=...) is a {type(opt_param_scheduler).__name__} without {missing}; give "
            f"Megatron's OptimizerParamScheduler, a scheduler with both, or None if there is none"
        )
    if not isinstance(config, MoetionConfig):
        raise ConfigError(f"attach(config=...) is a {type(config).__name__}; give a MoetionConfig")
    if not isinstance(p2p_communicator, TimedCommunicator | None):
        raise ConfigError(
            f"attach(p2p_communicator=...) is a {type(p2p_communicator).__name__}; give the one of "
            f"megatron_moetion.mcore.traffic.pipeline_arguments(), or nothing"
        )
    if missing := _missing_of_state(user_state):
        raise ConfigError(
            f"attach(user_state=...) is a {type(user_state).__name__} without {missing}; give an object "
            f"with both, or nothing if the loop has no state beyond its iteration"
        )


def _missing_of_state(thing: object) -> str:
    """Which methods of ``Stateful`` it lacks, for a person."""
    lacks = [n for n in ("state_dict", "load_state_dict") if thing is not None and not hasattr(thing, n)]
    return " and ".join(lacks)


def show_log(undo: ExitStack) -> None:
    """Let the runtime's few lines be seen, unless the program has decided what becomes of them."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
        undo.callback(_logger.setLevel, logging.NOTSET)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        _logger.addHandler(handler)
        undo.callback(_logger.removeHandler, handler)


def _trace(config: MoetionConfig, environment: Mapping[str, str]) -> Trace:
    """This rank's trace in ``config.trace_dir``."""
    rank, attempt = torch.distributed.get_rank(), restart_count(environment)
    return Trace(Path(config.trace_dir) / trace_name(rank, attempt), rank, attempt)
