# SPDX-License-Identifier: Apache-2.0
"""The machine that is checked: its GPUs, as torch sees them, and its memory."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts that parts and their results depend on."""

    gpus: tuple[str, ...] = ()
    """Names of the GPUs that torch can use; empty where the check does without."""
    driver: str | None = None
    torch: str = ""
    cuda: str | None = None
    """What torch was built for."""

    @property
    def on_gpu(self) -> bool:
        """Whether the parts run on a GPU."""
        return bool(self.gpus)

    def __str__(self) -> str:
        """One line for a person."""
        if not self.gpus:
            return f"no GPU, torch {self.torch}"
        driver = f", driver {self.driver}" if self.driver else ""
        return f"{len(self.gpus)} x {self.gpus[0]}{driver}, torch {self.torch} (CUDA {self.cuda})"


class NoGpu(Exception):
    """torch can use no GPU; the message says why, as far as it is known."""


def machine_here(*, on_gpu: bool) -> Machine:
    """This machine. ``NoGpu`` where a GPU is wanted and torch can use none."""
    import torch

    if not on_gpu:
        return Machine(torch=torch.__version__)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise NoGpu(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can use no GPU of this machine "
            f"(nvidia-smi: {_nvidia_smi('name') or 'none'}); --without-gpu tries the script itself"
        )
    return Machine(
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        driver=_nvidia_smi("driver_version"),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )


def commit_of(root: Path) -> str | None:
    """The commit that is checked out, with ``-dirty`` where files differ from it; None where git does not say."""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _nvidia_smi(field: str) -> str | None:
    """What nvidia-smi says of the first GPU; None where it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None
