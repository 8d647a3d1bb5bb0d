# SPDX-License-Identifier: Apache-2.0
"""Every setting of MoEtion, declared once. ``--moetion-*`` flags and their help are made from it."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from megatron_moetion.coding import Coding, coding_of
from megatron_moetion.errors import ConfigError

AUTO = "auto"
MODES = ("full", "popularity", "exact")
MIN_PERIOD, MAX_PERIOD = 2, 64
DEFAULT_PERIOD = 8
SCHEDULES = ("auto", "bubble", "steady", "eager")
OFF = "off"
SWITCH = ("on", OFF)
SLURM = "slurm"
TOPICS = (
    "The run and its memory",
    "Copies on other nodes",
    "Contents of a snapshot",
    "Mode popularity",
    "When a snapshot travels",
    "When something fails",
    "Checkpoints on disk",
    "What a run tells",
)
"""What settings are about, in the order of docs/flags.md."""
_RUN, _COPIES, _CONTENTS, _POPULARITY, _TRAVEL, _FAULTS, _DISK, _OUTPUT = TOPICS
_REFUSED = "refused: go back to the old value, or take another --moetion-run-id"
_ROOM = "refused where arenas would need another size: go back to the old value, or take another --moetion-run-id"
STANDBY = "MOETION_STANDBY"
"""Environment of a machine that stands by: a file, where it writes the name of the one whose place it has taken."""
ENDPOINT = "MOETION_RENDEZVOUS"
"""Environment: host:port of a rendezvous store that lives as long as the job, where the launcher's own does not."""
SELECTIONS = ("unsaved-tokens", "popularity-ema", "sequential")


def flag_of(name: str) -> str:
    """The flag of a parsed argument: ``--moetion-run-id`` of ``moetion_run_id``."""
    return "--" + name.replace("_", "-")


def resolved_schedule(schedule: str, *, on_device: bool) -> str:
    """What ``auto`` stands for, where training computes on a GPU or on the host; other schedules stay as they are."""
    if schedule != "auto":
        return schedule
    return "steady" if on_device else "bubble"


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field. Its metadata becomes the flag's help and, of ``MoetionConfig``, its part of docs/flags.md.

    ``topic``: one of ``TOPICS``. ``unit``: of a number. ``choices``, ``minimum``: what it may be, and ``values``, in
    words, where a minimum does not say all. ``metavar``: as argparse has it. ``modes``: those in which it may differ
    from its default; ``hint``: what to do in others. ``used_in``: the modes that use it, where others leave it alone.
    ``per_rank=True``: it may differ between ranks; all others are equal on all of them.
    ``fixed``: what another value does to a run that is started again; without it the value may change. With
    ``expert=True`` the flag is accepted, and ``--help`` does not show it: no run needs another value.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class MoetionConfig:
    """Settings of one run; equal on all ranks, unless ``per_rank`` says otherwise. Sizes in bytes, times in the unit
    that the name ends with.
    """

    mode: str = setting(
        AUTO,
        "contents of a snapshot: 'full' (all units, bitwise recovery), 'exact' (a slice of the state and all "
        "gradients, bitwise recovery), 'popularity' (dense units and the selected experts) or 'auto': after a few "
        "iterations the first of these that fits the network and the memory; a restart keeps what its arenas say. "
        "Settings that have no meaning in a mode leave it out",
        topic=_RUN,
        choices=(AUTO, *MODES),
        fixed=f"{_REFUSED}. 'auto' takes the mode of the arenas",
    )
    run_id: str = setting(
        "",
        "name of this run, by which a restart finds its arenas: the same at every start of the run, and another one "
        "for every other run. Default: SLURM_JOB_ID, else the --rdzv-id of torchrun",
        topic=_RUN,
        fixed="another name is another run: it begins from --load or from iteration 0, and these arenas stay",
    )
    store: str = setting(
        "",
        "folder for the arenas, on a file system in memory (tmpfs); the arenas of a run are in a folder of its name "
        "below it. Default: /dev/shm/moetion-UID",
        topic=_RUN,
        metavar="DIR",
        per_rank=True,
        fixed="this node's arenas are not found there; what they held comes from replicas",
    )
    replicas: int = setting(
        -1,
        "copies of each rank's snapshots in other nodes' memory; 0 keeps none. -1: 1 where the run has several nodes, "
        "else 0. As many nodes may be lost at once, and each copy takes one more arena a rank",
        topic=_COPIES,
        unit="copies",
        minimum=-1,
    )
    coding_nodes: int = setting(
        0,
        "nodes of a group, n, that keep fragments of each other's snapshots and no whole copies; 0: whole copies. With "
        "r replicas each of the n - 1 other nodes keeps a fragment, any n - r of them rebuild a snapshot, and memory "
        "and network for copies fall from r to (n - 1) / (n - r) times a snapshot: with 2 replicas and 5 nodes from 2 "
        "to 1.33. Needs 2 replicas or more, n from r + 2 to 33, and the extra 'coding'",
        topic=_COPIES,
        unit="nodes",
        minimum=0,
    )
    ranks_per_node: int = setting(
        0,
        "ranks that form one node; 0: as launched. Smaller numbers emulate several nodes on one machine",
        topic=_COPIES,
        unit="ranks",
        minimum=0,
    )
    failure_domains: str = setting(
        AUTO,
        "where nodes stand, so that copies of one state are in different failure domains: a file with a line for each "
        "node, its name and its domain, which may be nested ('node17 switch1/rack2'); or 'slurm', the switches or "
        "blocks of SLURM's topology; 'auto', as 'slurm' where SLURM knows them; or 'off'. Other groups of nodes at a "
        "restart mean that copies move",
        topic=_COPIES,
        metavar="FILE",
    )
    network_interface: str = setting(
        "",
        "network interface that carries replicas: its name or the beginning of it, or several, comma separated, of "
        "which the first that is there counts. Default: GLOO_SOCKET_IFNAME, else the one of the route to the host of "
        "the rendezvous",
        topic=_COPIES,
        metavar="NAMES",
        per_rank=True,
    )
    interval: int = setting(
        1,
        "iterations from one snapshot to the next; a fault costs up to as many",
        topic=_CONTENTS,
        unit="iterations",
        minimum=1,
        modes=("full", "popularity"),
        hint="mode 'exact' needs the gradients of every iteration; --moetion-period says how often state is captured",
    )
    experts_per_snapshot: int = setting(
        0,
        "K: experts of this rank in each snapshot of mode 'popularity'; 0: as many as fit the idle windows, from the "
        "staleness cap's need to twice that",
        topic=_POPULARITY,
        unit="experts",
        minimum=0,
        modes=("popularity",),
        fixed=_ROOM,
        hint="--moetion-period says how much of the state a snapshot of mode 'exact' holds",
    )
    period: int = setting(
        0,
        "mode 'exact': iterations until each slice of the state is captured anew; recovery replays at most twice as "
        "many optimizer steps. A longer period makes snapshots smaller and needs more memory. 0: the shortest that "
        f"keeps --moetion-snapshot-bytes, else {DEFAULT_PERIOD}, or less where the store has no room for its arenas",
        topic=_CONTENTS,
        unit="iterations",
        minimum=0,
        values=f"0, or {MIN_PERIOD} to {MAX_PERIOD}",
        modes=("exact",),
        fixed=f"{_REFUSED}. 0 takes the period of the arenas",
    )
    selection: str = setting(
        "unsaved-tokens",
        "which experts go first in mode 'popularity': 'unsaved-tokens' (most tokens since their last capture), "
        "'popularity-ema' (most recent tokens) or 'sequential' (in turn)",
        topic=_POPULARITY,
        choices=SELECTIONS,
        used_in=("popularity",),
    )
    snapshot_bytes: int = setting(
        0,
        "instead of K: bytes of a snapshot of one rank, on average; K is the number that fits on every rank, and does "
        "not grow for --moetion-lost-token-budget. In mode 'exact' instead of --moetion-period. 0: no such limit",
        topic=_CONTENTS,
        unit="bytes",
        minimum=0,
        modes=("popularity", "exact"),
        metavar="BYTES",
        fixed=_ROOM,
    )
    lost_token_budget: float = setting(
        0.0375,
        "most tokens that faults may cost experts, as a share of those they processed: if a fault now could cost more, "
        "a snapshot takes more than K experts. 0: no limit",
        topic=_POPULARITY,
        unit="share",
        values="0 to below 1",
        metavar="SHARE",
        used_in=("popularity",),
        fixed=f"another limit may be given; from 0 to a limit, and back: {_ROOM}",
    )
    max_experts_per_snapshot: int = setting(
        0,
        "most experts that K may grow to for --moetion-lost-token-budget; 0: half of them (or K, if that is more), for "
        "which arenas hold two captures of each on average, where those of mode 'full' hold three. More take more "
        "memory",
        topic=_POPULARITY,
        unit="experts",
        minimum=0,
        used_in=("popularity",),
        fixed=_ROOM,
    )
    capacity_recalibration: str = setting(
        "off",
        "after a fault, layers whose experts lost tokens drop fewer for a while, until the lost ones are made up for "
        "(models with --moe-expert-capacity-factor; up to a quarter more activations of experts): 'on' or 'off'",
        topic=_POPULARITY,
        choices=SWITCH,
        modes=("popularity",),
        hint="a recovery in other modes loses no tokens",
    )
    recalibration_iterations: int = setting(
        50,
        "with --moetion-capacity-recalibration on: the most iterations for which capacity is raised after a fault",
        topic=_POPULARITY,
        unit="iterations",
        minimum=1,
        used_in=("popularity",),
    )
    schedule: str = setting(
        "auto",
        "when snapshots travel: 'bubble' (in the gaps that training leaves on the network), 'steady' (evenly over most "
        "of an iteration, whatever training does), 'eager' (at once) or 'auto' ('bubble' where the host computes, "
        "'steady' on a GPU). On a GPU 'bubble' finds gaps by events of the device and yields by calls of the host, "
        "which run ahead of it: it may hold bytes back while the network is idle, and send while training does",
        topic=_TRAVEL,
        choices=SCHEDULES,
    )
    trace_dir: str = setting(
        "",
        "folder for a Perfetto trace of each rank, with lanes for computing, training's traffic and replication; "
        "'moetion report' draws them. Given on all ranks or on none, which is the default",
        topic=_OUTPUT,
        metavar="DIR",
        per_rank=True,
    )
    staleness_cap: int = setting(
        8,
        "mode 'popularity': most snapshots until an expert is captured again. K times the cap must reach the experts "
        "of a rank's layers",
        topic=_POPULARITY,
        unit="snapshots",
        minimum=1,
        used_in=("popularity",),
        fixed=_ROOM,
    )
    chunk_bytes: int = setting(
        1 << 20,
        "bytes that have one digest, and are verified and sent together",
        topic=_RUN,
        unit="bytes",
        values="a multiple of 64, at least 4096",
        metavar="BYTES",
        expert=True,
        fixed=_REFUSED,
    )
    pack_threads: int = setting(
        0,
        "threads that copy state into the arena of this rank; 0: half of the rank's share of the cores, 1 to 8",
        topic=_TRAVEL,
        unit="threads",
        minimum=0,
        per_rank=True,
    )
    pack_sms: int = setting(
        4,
        "on a GPU: most streaming multiprocessors that packing takes from training",
        topic=_TRAVEL,
        unit="multiprocessors",
        minimum=1,
        expert=True,
        per_rank=True,
    )
    max_stall_ms: int = setting(
        2000,
        "how long an optimizer step waits for a snapshot in flight before the snapshot is dropped; in mode 'exact' "
        "also how long training waits in an iteration for replication that is behind",
        topic=_TRAVEL,
        unit="milliseconds",
        minimum=1,
        per_rank=True,
    )
    timeout_s: int = setting(
        120,
        "limit for every wait on a peer: connections, agreement at the start, bytes that a recovery fetches",
        topic=_FAULTS,
        unit="seconds",
        minimum=1,
    )
    hang_timeout_s: int = setting(
        120,
        "how long a rank may be silent, and no step end, until the other ranks' processes end so that their supervisor "
        "restarts the job; 0: they never end for that",
        topic=_FAULTS,
        unit="seconds",
        minimum=0,
    )
    warm_restarts: int = setting(
        0,
        "restarts for which processes that have imported everything stand by and fork each rank again, which takes a "
        "part of the time of a new process; faults beyond that, and a lost node for which no other one stands by, are "
        "left to torchrun. 0: none",
        topic=_FAULTS,
        unit="restarts of a launch",
        minimum=0,
    )
    holder_patience: int = setting(
        30,
        "snapshots that a rank waits for another node that holds its replicas and takes none: then it asks other nodes "
        "for room, and goes on with fewer replicas until one has all of them",
        topic=_COPIES,
        unit="snapshots",
        minimum=1,
    )
    max_unprotected_iterations: int = setting(
        -1,
        "after snapshots have stopped for good: iterations until the process ends, so that its supervisor restarts the "
        "job from the stable iteration; 0: it never ends for that. -1: 20 if torchrun has restarts left, else never",
        topic=_FAULTS,
        unit="iterations",
        minimum=-1,
        per_rank=True,
    )
    max_fruitless_recoveries: int = setting(
        3,
        "recoveries in a row from memory, without a newer stable iteration in between, after which memory's state "
        "counts as what makes training fail: a restart then loads the checkpoint of --load, however old, or stops; "
        "0: no limit",
        topic=_FAULTS,
        unit="recoveries",
        minimum=0,
    )
    in_flight_bytes: int = setting(
        64 << 20,
        "most bytes handed to the network at once by one rank",
        topic=_TRAVEL,
        unit="bytes",
        minimum=1,
        metavar="BYTES",
        expert=True,
    )
    save: str = setting(
        "",
        "folder for checkpoints on disk that processes beside training write from memory, so that training does not "
        "stop for them; every node must see it. Default: that of --save. 'off': training writes its checkpoints "
        "itself, as it does in mode 'popularity' in any case",
        topic=_DISK,
        metavar="DIR",
        used_in=("full", "exact"),
    )
    save_interval: int = setting(
        0,
        "iterations between such checkpoints; 0: as --save-interval says. Without either there is one when the job is "
        "told to end",
        topic=_DISK,
        unit="iterations",
        minimum=0,
        used_in=("full", "exact"),
    )
    grace_s: int = setting(
        0,
        "most seconds that a process which gets SIGTERM stays while the stable iteration is written to disk; 0: it "
        "ends at once, and what writes goes on as long as the machine lets it",
        topic=_DISK,
        unit="seconds",
        minimum=0,
        used_in=("full", "exact"),
    )
    save_limit_s: int = setting(
        1800,
        "longest that one such checkpoint may take until it is given up",
        topic=_DISK,
        unit="seconds",
        minimum=1,
        used_in=("full", "exact"),
        expert=True,
    )
    state_hash_interval: int = setting(
        0,
        "iterations between hashes of the whole training state in the log and --moetion-report; 0: none. Runs with "
        "equal hashes have equal state, bit for bit; each hash copies all state to the host",
        topic=_OUTPUT,
        unit="iterations",
        minimum=0,
    )
    report: str = setting(
        "",
        "file to which rank 0 appends events as JSON lines: every recovery with its phases, and a summary at the end",
        topic=_OUTPUT,
        metavar="PATH",
        per_rank=True,
    )
    allow_fresh: bool = setting(
        False,
        "start from iteration 0 although a restart finds nothing to recover; without it such a start ends with exit "
        "code 3",
        topic=_FAULTS,
    )
    inject_fault: str = setting(
        "",
        "for tests: ATTEMPT:RANK:ITERATION:POINT[:KIND][,...] hurts that rank there, or at the first later iteration "
        "that reaches the point, once, after a line that says so; KIND is SIGKILL (the default), SIGTERM, SIGINT, "
        "SIGSTOP, WORKLOAD_EXC, OS_ABORT, SEGFAULT or LOCK_GIL",
        topic=_FAULTS,
        per_rank=True,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check_bounds(each)
        if not 0 <= self.lost_token_budget < 1:
            raise ConfigError(
                f"--moetion-lost-token-budget is {self.lost_token_budget}; it is a share, from 0 (no limit) to below 1"
            )
        for one in ("experts_per_snapshot", "period"):
            if getattr(self, one) and self.snapshot_bytes:
                raise ConfigError(
                    f"{flag_of('moetion_' + one)} {getattr(self, one)} and --moetion-snapshot-bytes "
                    f"{self.snapshot_bytes} both say how large a snapshot is; give one"
                )
        if self.save_interval and not self.save:
            raise ConfigError(
                f"--moetion-save-interval is {self.save_interval}, and nothing says where checkpoints go; give "
                f"--moetion-save DIR (or --save DIR) too"
            )
        if 0 < self.max_experts_per_snapshot < self.experts_per_snapshot:
            raise ConfigError(
                f"--moetion-max-experts-per-snapshot {self.max_experts_per_snapshot} is less than "
                f"--moetion-experts-per-snapshot {self.experts_per_snapshot}"
            )
        if self.period and not MIN_PERIOD <= self.period <= MAX_PERIOD:
            raise ConfigError(
                f"--moetion-period is {self.period}; it must be from {MIN_PERIOD} to {MAX_PERIOD} "
                f"(all of the state in every snapshot is mode 'full')"
            )
        if self.chunk_bytes < 4096 or self.chunk_bytes % 64:
            raise ConfigError(
                f"--moetion-chunk-bytes is {self.chunk_bytes}; it must be a multiple of 64, at least 4096"
            )

        if self.coding_nodes:
            coding_of(self.replicas, self.coding_nodes)
        if not self.allowed_modes:
            given = ", ".join(flag_of(f"moetion_{f.name}") for f in self._given() if "modes" in f.metadata)
            raise ConfigError(f"no mode has a meaning for all of these settings: {given}; leave one of them out")

    @property
    def allowed_modes(self) -> tuple[str, ...]:
        """The mode; for 'auto' all modes in which every given setting has a meaning."""
        if self.mode != AUTO:
            return (self.mode,)
        return tuple(m for m in MODES if all(m in f.metadata.get("modes", MODES) for f in self._given()))

    def in_mode(self, mode: str, period: int = 0) -> MoetionConfig:
        """These settings, with 'auto' replaced by one of ``allowed_modes``; ``period`` where none is given."""
        return replace(self, mode=mode, period=self.period or period)

    @property
    def coding(self) -> Coding:
        """What other nodes keep, once ``replicas`` is settled."""
        return coding_of(self.replicas, self.coding_nodes)

    @property
    def recalibrates(self) -> bool:
        """Whether expert capacity is raised after a recovery that lost tokens."""
        return self.capacity_recalibration == "on"

    def _check_bounds(self, of: Field[Any]) -> None:
        flag, value = flag_of(f"moetion_{of.name}"), getattr(self, of.name)
        minimum, choices = of.metadata.get("minimum"), of.metadata.get("choices")
        if minimum is not None and value < minimum:
            must = f"be at least {minimum}" if minimum else "not be negative"
            raise ConfigError(f"{flag} is {value}; it must {must}")
        if choices is not None and value not in choices:
            raise ConfigError(f"{flag} is {value!r}; choose one of {', '.join(choices)}")
        modes = of.metadata.get("modes", MODES)
        if value != of.default and self.mode not in (AUTO, *modes):
            hint = f"; {of.metadata['hint']}" if "hint" in of.metadata else ""
            raise ConfigError(
                f"{flag} {value} has no meaning in mode {self.mode!r}, only in {' and '.join(map(repr, modes))}{hint}"
            )

    def _given(self) -> list[Field[Any]]:
        """Settings that differ from their defaults."""
        return [f for f in fields(self) if getattr(self, f.name) != f.default]
