# SPDX-License-Identifier: Apache-2.0
"""Replaces a method of one object, where Megatron-Core has no hook.

``traffic.py``, ``steplog.py`` and ``step_watch.py`` are all that use it, and list what they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes a method and returns a function that calls it."""


def replace_method(owner: Any, name: str, wrap: Wrap, undo: ExitStack) -> None:
    """Call ``wrap(owner.name)`` where ``owner.name`` was called, on this object alone, until ``undo`` is closed.

    Where somebody else has replaced the method in turn by then, it is left as it is, and still calls ours.
    """
    before = vars(owner).get(name)
    replacement = wrap(getattr(owner, name))

    def restore() -> None:
        if vars(owner).get(name) is not replacement:
            return
        if before is None:
            delattr(owner, name)  # the class's method shows again
        else:
            setattr(owner, name, before)

    setattr(owner, name, replacement)
    undo.callback(restore)
