# SPDX-License-Identifier: Apache-2.0
"""What an interpreter lacks to build the extension and run ``gpu_check``, in one line with what would bring it.

Runs under the interpreter in question, with nothing but the standard library: ``python scripts/_needs.py 0|1``, where 1
asks for the CUDA kernels too. Prints nothing where nothing is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("g++", "clang++", "c++")


class Need(NamedTuple):
    """A package, the module by which it is found, and the oldest version that will do.

    ``below``: what to install is older than this. A newer one that is there already is taken. ``since``: the oldest
    Python that needs it.
    """

    package: str
    module: str
    oldest: str
    below: str = ""
    since: tuple[int, int] = (3, 0)

    @property
    def wanted(self) -> str:
        """As pip is asked for it."""
        return f"{self.package}>={self.oldest}" + (f",<{self.below}" if self.below else "")


NEEDS = (
    Need("torch", "torch", "2.6"),
    Need("megatron-core", "megatron.core", "0.16", below="0.20"),
    Need("numpy", "numpy", "1.26"),
    Need("einops", "einops", "0.8"),
    Need("triton", "triton", "3", since=(3, 12)),  # megatron-core 0.19, which needs that Python, does not declare it
    Need("psutil", "psutil", "5.9"),
    Need("rich", "rich", "13"),
    Need("pytest", "pytest", "8"),
    Need("pytest-timeout", "pytest_timeout", "2.3"),
    Need("hypothesis", "hypothesis", "6.100"),
    Need("setuptools", "setuptools", "77"),
    Need("pybind11", "pybind11", "2.13"),
    Need("ninja", "ninja", "1.11"),
)


def is_older(version: str, oldest: str) -> bool:
    """Whether a version is before ``oldest``, by its leading numbers."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.match(r"[\d.]*", text).group().strip(".").split(".") if n]  # type: ignore[union-attr]

    return numbers(version) < numbers(oldest)


def problem_of(need: Need) -> str | None:
    """Why the interpreter cannot use a package; None if it can."""
    try:
        if importlib.util.find_spec(need.module) is None:
            return f"no {need.package}"
        version = importlib.metadata.version(need.package)
    except importlib.metadata.PackageNotFoundError:
        return None  # built by hand: nobody knows its version
    except ModuleNotFoundError:  # of a module's parent
        return f"no {need.package}"
    return f"{need.package} {version}" if is_older(version, need.oldest) else None


def missing(*, cuda: bool, python: str = sys.executable, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """All that is missing, each with what would bring it. ``python`` is the interpreter of this ``version``."""
    found = []
    needs = [need for need in NEEDS if version >= need.since]
    problems = {need: problem for need in needs if (problem := problem_of(need)) is not None}
    if problems:
        wanted = " ".join(shlex.quote(need.wanted) for need in problems)
        found.append(f"{', '.join(problems.values())} ({python} -m pip install {wanted})")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(f"no Python.h (apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)")
    compilers = [name for name in (os.environ.get("CXX"), *COMPILERS) if name]
    if not any(shutil.which(name) for name in compilers):
        found.append("no C++ compiler (apt install g++)")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if cuda and not (shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")):
        found.append("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda (install the CUDA toolkit, or set CUDA_HOME)")
    return found


if __name__ == "__main__":
    print("; ".join(missing(cuda=sys.argv[1] == "1")))
