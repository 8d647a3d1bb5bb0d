# SPDX-License-Identifier: Apache-2.0
"""Names in the store's folders, whatever stands under them: files of ours, or something that a person left there."""

from __future__ import annotations

import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from megatron_moetion.errors import CorruptArena


def open_regular(path: Path, flags: int, *, of_anyone: bool = False) -> int:
    """Open a regular file of this user's, following no link and waiting for nobody. Raises ``CorruptArena``.

    ``of_anyone``: another user's file will do, if it can be opened.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CorruptArena(f"{path} cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and (of_anyone or status.st_uid == os.geteuid()):
        return fd
    os.close(fd)
    what = f"belongs to user {status.st_uid}" if stat.S_ISREG(status.st_mode) else "is no regular file"
    raise CorruptArena(f"{path} {what}")


def open_or_make(path: Path) -> int:
    """Open a file for reading and writing, made if it is not there; what is no file of ours is moved out of the way."""
    try:
        return open_regular(path, os.O_RDWR | os.O_CREAT)
    except CorruptArena:
        clear(path)
        return open_regular(path, os.O_RDWR | os.O_CREAT)


def clear(path: Path) -> None:
    """Free a name, whatever stands under it: a file is deleted, anything else is moved aside. Others may do so too."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        with suppress(FileNotFoundError):
            path.rename(path.with_name(f"{path.name}.unusable-{uuid.uuid4().hex}"))
