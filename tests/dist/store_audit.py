# SPDX-License-Identifier: Apache-2.0
"""Notes what a process does with files of the store, and everything that it unpickles."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def listen(store: Path, write: Callable[..., None]) -> None:
    """From now on, for as long as the process lives. Each access and each event is noted once."""
    root = str(store)
    seen: set[tuple[str, str]] = set()
    busy = threading.local()

    def note(kind: str, what: str) -> None:
        if (kind, what) not in seen:
            seen.add((kind, what))
            write("audit", kind=kind, what=what)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if getattr(busy, "now", False):
            return
        busy.now = True
        try:
            if event == "pickle.find_class":
                note("pickle", ".".join(map(str, args)))
            for arg in args:
                if isinstance(arg, (str, bytes, os.PathLike)):
                    path = os.fsdecode(arg)
                    if path.startswith(root):
                        note(event, os.path.relpath(path, root))
        finally:
            busy.now = False

    sys.addaudithook(hook)
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        _note_calls(module, name, note)


def _note_calls(module: Any, name: str, note: Callable[[str, str], None]) -> None:
    """Data without classes raises no audit event when it is unpickled, so the calls are noted too."""
    original = getattr(module, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note("pickle", f"{module.__name__}.{name}")
        return original(*args, **kwargs)

    setattr(module, name, noted)
