# SPDX-License-Identifier: Apache-2.0
"""Inputs that targets begin with: seeds made of real structures, and every input that has ever failed."""

from __future__ import annotations

import zlib
from pathlib import Path

from targets import Target

FOLDER = Path(__file__).parent / "corpus"
"""By target, a file an input that has failed, compressed. Whoever mends what fails puts its input here."""


def inputs(target: Target) -> dict[str, bytes]:
    """By name."""
    failed = {path.name: zlib.decompress(path.read_bytes()) for path in sorted((FOLDER / target.name).glob("*.z"))}
    return {f"seed {n}": seed for n, seed in enumerate(target.seeds())} | failed


def keep(folder: Path, target: str, name: str, data: bytes) -> Path:
    """Write an input as the corpus has it."""
    path = folder / target / f"{name}.z"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(data, 9))
    return path
