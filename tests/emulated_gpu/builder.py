# SPDX-License-Identifier: Apache-2.0
"""Builds the package for the emulated GPU: nvcc's PTX as C++, the project's own ``csrc``, and a CUDA runtime for tests.

nvcc compiles ``kernels.cu`` once: its PTX is translated, its launch stubs are linked as they are. All other files of
``csrc`` are compiled as for a GPU. In place of CUDA's runtime stands ``emulator/``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from mutants import MUTANTS
from ptx_to_cpp import translate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARCHITECTURES = ("80", "90", "100")
JOBS = 2


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """What CUDA's developers install."""

    nvcc: Path
    include: Path
    """The folder of ``cuda_runtime_api.h``."""


def find_toolkit() -> Toolkit | None:
    """What ``CUDA_HOME``, the path or the usual place have; None where something is missing."""
    home = os.environ.get("CUDA_HOME")
    path = f"{home or ''}/bin:{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        return None
    homes = (home, Path(nvcc).resolve().parent.parent, "/usr/local/cuda")
    found = [Path(h) / "include" for h in homes if h and (Path(h) / "include" / "cuda_runtime_api.h").exists()]
    return Toolkit(nvcc=Path(nvcc), include=found[0]) if found else None


def build(toolkit: Toolkit, folder: Path) -> Path:
    """Build in ``folder``; the path to import ``megatron_moetion`` from, on the emulated GPU."""
    ptx = _run_nvcc(toolkit, folder)
    generated = []
    for variant, text in _variants(ptx).items():
        file = folder / f"kernels_{variant}.cpp"
        file.write_text(translate(text, variant))
        generated.append(file)
    csrc = ROOT / "csrc"
    emulator = sorted((HERE / "emulator").glob("*.cpp"))
    # what takes longest first, so that no job ends with it
    sources = [csrc / "bindings.cpp", *generated, *emulator, *csrc.glob("host/*.cpp"), *csrc.glob("cuda/*.cpp")]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda source: _compile(toolkit, folder, source), sources))
    package = folder / "python" / "megatron_moetion"
    package.mkdir(parents=True)
    for path in (ROOT / "megatron_moetion").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run("g++", "-shared", "-pthread", *objects, folder / "kernels.o", "-o", module)
    return package.parent


def _run_nvcc(toolkit: Toolkit, folder: Path) -> dict[str, str]:
    """The launch stubs in ``kernels.o``; the PTX by architecture, of those that this nvcc knows."""
    listed = _run(toolkit.nvcc, "--list-gpu-arch").split()
    known = [a for a in ARCHITECTURES if f"compute_{a}" in listed]
    targets = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in known]
    kept = folder / "nvcc"
    kept.mkdir()
    source = ROOT / "csrc" / "cuda" / "kernels.cu"
    options = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--keep", "--keep-dir", kept)
    _run(toolkit.nvcc, *options, *targets, "-c", source, "-o", folder / "kernels.o")
    return {a: (kept / f"kernels.compute_{a}.ptx").read_text() for a in known}


def _variants(ptx: Mapping[str, str]) -> dict[str, str]:
    """PTX by the name that the emulator knows it by."""
    return {
        **{f"compute_{a}": text for a, text in ptx.items()},
        **{mutant.__name__: mutant(ptx["90"]) for mutant in MUTANTS},
    }


def _compile(toolkit: Toolkit, folder: Path, source: Path) -> Path:
    target = folder / (re.sub(r"\W", "_", str(source.relative_to(source.parents[1]))) + ".o")
    includes = [pybind11.get_include(), sysconfig.get_path("include"), toolkit.include]
    own = [HERE / "emulator", ROOT / "csrc"]
    # Fibers switch by longjmp between stacks, which the hardened one takes for a fault.
    flags = "-std=c++17 -O1 -fPIC -fvisibility=hidden -pthread -DMOETION_WITH_CUDA"
    flags += (
        " -w" if source.parent == folder else " -Wall -Wextra -Wno-clobbered -Werror"
    )  # PTX has registers that nothing reads
    unhardened = "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0"
    searched = [*(f"-I{path}" for path in own), *(f"-isystem{path}" for path in includes)]
    _run("g++", *flags.split(), *unhardened.split(), *searched, "-c", source, "-o", target)
    return target


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return done.stdout
