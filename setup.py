# SPDX-License-Identifier: Apache-2.0
"""Builds ``megatron_moetion._C`` with ninja. Everything else about the package is in pyproject.toml.

``MOETION_CUDA=auto|0|1``: ``1`` fails where the CUDA kernels cannot be built, ``auto`` builds for the host then.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Werror"
RULES = """
rule compile
  command = $cxx -MMD -MF $out.d $flags $includes -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -pthread $in -o $out
"""


def check_cuda() -> None:
    """Settle ``MOETION_CUDA``. This version has no CUDA sources, so the host kernels are all there is to build."""
    wanted = os.environ.get("MOETION_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MOETION_CUDA is {wanted!r}; it must be auto, 0 or 1")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    why = "this version has no CUDA kernels yet" if nvcc else "nvcc is neither on PATH nor in CUDA_HOME"
    if wanted == "1":
        raise SystemExit(f"MOETION_CUDA=1, but {why}; MOETION_CUDA=0 or auto builds for the host")
    if wanted == "auto":
        print(f"[moetion] {why}: building the host kernels only", flush=True)


def escaped(path: Path) -> str:
    """A path as ninja's build statements want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles one extension by a generated ``build.ninja``: parallel, and again only what changed."""

    def build_extension(self, ext: Extension) -> None:
        check_cuda()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f"-isystem '{path}'" for path in (pybind11.get_include(), sysconfig.get_path("include")))
        objects = {source.replace("/", "_") + ".o": Path(source).resolve() for source in ext.sources}
        lines = [f"cxx = {os.environ.get('CXX', 'g++')}", f"flags = {FLAGS} {os.environ.get('CXXFLAGS', '')}"]
        lines += [f"includes = {includes}", RULES]
        lines += [f"build {name}: compile {escaped(source)}" for name, source in objects.items()]
        lines += [f"build {escaped(target)}: link {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


sources = sorted(glob("csrc/*.cpp") + glob("csrc/host/*.cpp"))
setup(ext_modules=[Extension("megatron_moetion._C", sources)], cmdclass={"build_ext": NinjaBuild})
