# SPDX-License-Identifier: Apache-2.0
"""Which systems there are, in which configuration, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A system in one configuration."""

    title: str
    environment: str
    """A file of ``requirements/`` without its ending; systems with the same one share it."""
    system: str = ""
    """Class below ``systems/``."""
    configuration: str = ""
    interval: str = ""
    """What its documentation recommends."""
    keeps_all: bool = True
    """Whether a recovery brings all state back to one iteration, by design."""
    rare: bool = True
    """Whether copies can be rarer than one an iteration."""
    only_flip: bool = False
    variant: bool = False
    """Another configuration of a system, beside the one that the summary shows."""
    fault_at: int = 5
    """The iteration after which faults come; later where a system's copies take some to be what they always are."""
    agent: str = ""
    """Module below ``systems/`` that runs once on each host, outlives the ranks, and is ended with the host."""

    @property
    def is_ours(self) -> bool:
        """Whether it is this project."""
        return self.system.startswith("ours:")


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A system that does not run here."""

    title: str
    reason: str
    unblocked_by: str


TORCH = "torch"
NOTHING = "none"

PEERS = {
    NOTHING: Peer(title="no copies", environment=TORCH),
    "full": Peer(
        title="ours, full",
        environment=TORCH,
        system="ours:Full",
        configuration="mode full, one replica",
        interval="1",
    ),
    "exact": Peer(
        title="ours, exact",
        environment=TORCH,
        system="ours:Exact",
        configuration="mode exact, one replica",
        fault_at=12,
        interval="1",
        rare=False,
    ),
    "popularity": Peer(
        title="ours, popularity",
        environment=TORCH,
        system="ours:Popularity",
        configuration="mode popularity, one replica",
        fault_at=12,
        interval="1",
        keeps_all=False,
    ),
    "lm": Peer(
        title="lm-resiliency 0.2.0, GEMINI",
        environment="lm",
        system="lm:Gemini",
        configuration="save_tensors, one peer on the other host; survivors write to a disk that all hosts see",
        interval="10",
    ),
    "lm-verified": Peer(
        title="lm-resiliency 0.2.0, verify_integrity",
        environment="lm",
        system="lm:GeminiVerified",
        configuration="as above, with checksums in the files that a restart reads",
        variant=True,
        interval="10",
        only_flip=True,
    ),
    "nvrx": Peer(
        title="nvidia-resiliency-ext 0.4.1, local, async",
        environment="nvrx",
        system="nvrx:Local",
        configuration="LocalCheckpointManager in /dev/shm, clique of 2 hosts, a forked process writes",
    ),
    "nvrx-sync": Peer(
        title="nvidia-resiliency-ext 0.4.1, local, sync",
        environment="nvrx",
        system="nvrx:LocalSync",
        configuration="as above, training waits",
        variant=True,
    ),
    "dcp": Peer(
        title="torch DCP async_save, thread",
        environment=TORCH,
        system="dcp:Thread",
        configuration="to a disk that all hosts see; staging memory is kept, coordination has a group of its own",
    ),
    "dcp-process": Peer(
        title="torch DCP async_save, process",
        environment=TORCH,
        system="dcp:Process",
        configuration="as above, staged in shared memory",
        variant=True,
    ),
    "torch-checkpointing": Peer(
        title="torch_checkpointing 0.1.1",
        environment="torch_checkpointing",
        system="torch_ckpt:Manager",
        configuration="to a disk that all hosts see; asynchronous staging under its lock, a process a rank writes",
    ),
    "dlrover": Peer(
        title="DLRover 0.6.1, flash checkpoint",
        environment="dlrover",
        system="flash:Flash",
        configuration="StorageType.MEMORY, no replica (its default), its saver in an agent of each host",
        interval="5",
        agent="flash",
    ),
    "torch-save": Peer(
        title="torch.save to /dev/shm",
        environment=TORCH,
        system="torch_save:TorchSave",
        configuration="each rank its own file, no replica",
    ),
}
ABSENT = {
    "dlrover-replica": Absent(
        title="DLRover 0.6.1, replica_count=2",
        reason="with two ranks a host they end at the start: its `gather` looks ranks up by their place in the group",
        unblocked_by="one rank a host, or a version that mends it",
    ),
    "nvrx-0.5": Absent(
        title="nvidia-resiliency-ext 0.5 and newer",
        reason="its wheels are for glibc 2.39 and newer, and this machine has 2.36; 0.4.1 is the newest that installs",
        unblocked_by="a machine with glibc 2.39 or newer",
    ),
    "moevement": Absent(
        title="MoEvement (NSDI'26)",
        reason="it extends DeepSpeed, not Megatron-Core: the same training cannot be run with it",
        unblocked_by="a port of either the training or the system",
    ),
    "ml-flashpoint": Absent(
        title="ML Flashpoint",
        reason="0.0.10 is source only, and its build fetches Abseil from a host that this machine does not reach",
        unblocked_by="a machine that does; it is made for megatron-core 0.13.1 and torch 2.8",
    ),
}
