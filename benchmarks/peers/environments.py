# SPDX-License-Identifier: Apache-2.0
"""A virtual environment for each set of peers, with pinned versions; made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements"
DONE = "installed.txt"


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of an environment. It is made, or made again, where its requirements are not what it has."""
    wanted = _read(REQUIREMENTS / f"{name}.txt")
    home = folder / name
    python, done = home / "bin" / "python", home / DONE
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"installing {name} into {home}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", str(REQUIREMENTS / f"{name}.txt")], check=True)
    done.write_text(wanted)
    return python


def _read(path: Path) -> str:
    """Its text, and that of all files that it includes."""
    lines = []
    for line in path.read_text().splitlines():
        kind, _, other = line.partition(" ")
        lines.append(_read(path.parent / other.strip()) if kind in ("-r", "-c") else line)
    return "\n".join(lines)
