# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's names for checkpoints on disk, and the file that names the newest."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moetion.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_folder(root: str, iteration: int) -> Path:
    """Megatron-LM's name for the checkpoint of one iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def latest_iteration(root: str) -> int | None:
    """The iteration that the tracker file names, or None without one."""
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ConfigError(f"{tracker} holds {text!r}; it must hold the number of an iteration")
    return int(text)


def write_tracker(root: Path, iteration: int) -> None:
    """Name the newest checkpoint below ``root``, durably: the file is either the old one or the new one."""
    temporary = root / f".{TRACKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / TRACKER)
