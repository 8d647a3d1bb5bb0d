# SPDX-License-Identifier: Apache-2.0
"""A parser that says which flag was meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Refuses all unknown flags at once, each with the nearest one that there is. Parsers of commands are of it too."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As of ``argparse``; nothing is left unknown."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            named = [one for one in unknown if one.startswith("-")] or unknown  # what follows a flag is its value
            self.error("unknown: " + ", ".join(self._with_nearest(one) for one in named))
        return found, unknown

    def _with_nearest(self, flag: str) -> str:
        name = flag.partition("=")[0]
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        nearest = difflib.get_close_matches(name, flags, n=1, cutoff=0.7) if name.startswith("-") else []
        return f"{name} (did you mean {nearest[0]}?)" if nearest else name
