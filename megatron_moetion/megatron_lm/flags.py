# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's flags beside ``--moetion``: what cannot work together, and what they say of checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moetion.errors import ConfigError
from megatron_moetion.mcore.arguments import check_moetion_flags

REFUSED = {
    "skip_train": "--skip-train takes no step, so there is nothing to recover",
    "perform_rl_step": "--perform-rl-step keeps rollouts and reference weights that a recovery would not bring back",
    "inprocess_restart": "--inprocess-restart restarts training inside the process, whose memory MoEtion has in use; "
    "let torchrun restart it",
    "moe_use_upcycling": "--moe-use-upcycling converts a dense checkpoint, once, and refuses to start a second time: "
    "convert in a run of its own, then train from what it has saved",
    "fake_process_group": "--fake-process-group has no other ranks that could hold a replica",
}
"""Flags that cannot work with ``--moetion``, and why."""


def takes_part(flags: Any) -> bool:
    """Whether a run is to recover. A conversion of a checkpoint's format, which ends by itself, is not.

    Raises ``ConfigError`` for ``--moetion-*`` without ``--moetion``, and for settings that cannot be.
    """
    if not hasattr(flags, "moetion"):
        return False  # of a program that has a parser of its own
    check_moetion_flags(flags)
    return bool(flags.moetion) and getattr(flags, "ckpt_convert_format", None) is None


def refuse(flags: Any) -> None:
    """Raise ``ConfigError`` for flags that cannot work together with ``--moetion``."""
    why = [reason for name, reason in REFUSED.items() if getattr(flags, name, False)]
    if why:
        raise ConfigError(f"{'; '.join(why)}. Leave out either this or --moetion")


def newest_on_disk(flags: Any) -> int | None:
    """The iteration that Megatron's ``load_checkpoint`` would continue from, as far as files tell; None if none.

    None as well where a checkpoint is where training begins (``--finetune``, a release), and not how far it has come.
    Checkpoints of the type ``local`` are not looked at. ``ConfigError`` for a tracker file that cannot be read.
    """
    if flags.load is None or flags.finetune:
        return None
    folders = [Path(flags.load)]
    if getattr(flags, "non_persistent_ckpt_type", None) == "global":
        folders.append(Path(flags.non_persistent_global_ckpt_dir or folders[0] / "non_persistent"))
    found = [tracked(folder) for folder in folders]
    if getattr(flags, "ckpt_step", None):
        found[0] = flags.ckpt_step
    return max((iteration for iteration in found if iteration is not None), default=None)


def tracked(folder: Path) -> int | None:
    """The iteration that the tracker file in a folder of checkpoints names; None without one, or for a release."""
    from megatron_moetion.persist.tracker import TRACKER, latest_iteration

    tracker = folder / TRACKER
    if tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == "release":
        return None
    return latest_iteration(str(folder))
