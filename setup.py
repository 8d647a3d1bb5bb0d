# SPDX-License-Identifier: Apache-2.0
"""Builds ``megatron_moetion._C`` with ninja. Everything else about the package is in pyproject.toml.

``MOETION_CUDA=auto|0|1``: ``1`` fails where the CUDA kernels cannot be built, ``auto`` builds for the host then.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = "-Wall -Wextra -Werror"
FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread {WARNINGS}"
NVCC_FLAGS = f"-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,{WARNINGS.replace(' ', ',')}"
ARCHITECTURES = ("80", "90", "100")
RULES = """
rule compile
  command = $cxx -MMD -MF $out.d $flags $includes -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile_cuda
  command = $nvcc -MD -MF $out.d $nvcc_flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -pthread $in $libraries -o $out
"""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit to compile with."""

    nvcc: Path

    @property
    def home(self) -> Path:
        """The toolkit's folder; a wrapper script on PATH may stand somewhere else."""
        for home in (os.environ.get("CUDA_HOME"), self.nvcc.resolve().parent.parent, "/usr/local/cuda"):
            if home and (Path(home) / "include" / "cuda_runtime_api.h").exists():
                return Path(home)
        raise SystemExit(f"{self.nvcc} is there, but no cuda_runtime_api.h; set CUDA_HOME to the CUDA toolkit")

    def targets(self) -> str:
        """Code for the architectures that this nvcc knows, and PTX of the newest of them for later ones."""
        listed = subprocess.run([self.nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        known = [a for a in ARCHITECTURES if f"sm_{a}" in listed.split()]
        if not known:
            raise SystemExit(f"{self.nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}; use CUDA 12 or newer")
        codes = {a: f"sm_{a}" for a in known} | {known[-1]: f"[sm_{known[-1]},compute_{known[-1]}]"}
        return " ".join(f"-gencode arch=compute_{a},code={code}" for a, code in codes.items())

    def libraries(self) -> str:
        """The runtime, linked statically: the module loads where there is no CUDA, and serves any torch."""
        folders = " ".join(f"-L'{self.home / name}'" for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
        return f"{folders} -lcudart_static -ldl -lrt"


def find_cuda() -> Cuda | None:
    """The toolkit to build with, as ``MOETION_CUDA`` wants it; None for the host kernels alone."""
    wanted = os.environ.get("MOETION_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MOETION_CUDA is {wanted!r}; it must be auto, 0 or 1")
    if wanted == "0":
        return None
    path, home = os.environ.get("PATH", os.defpath), os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin:{path}" if home else f"{path}:/usr/local/cuda/bin")
    if nvcc is not None:
        return Cuda(Path(nvcc))
    why = "nvcc is neither on PATH nor in CUDA_HOME"
    if wanted == "1":
        raise SystemExit(f"MOETION_CUDA=1, but {why}; MOETION_CUDA=0 or auto builds for the host")
    print(f"[moetion] {why}: building the host kernels only", flush=True)
    return None


def escaped(path: Path) -> str:
    """A path as ninja's build statements want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles one extension by a generated ``build.ninja``: parallel, and again only what changed."""

    def build_extension(self, ext: Extension) -> None:
        cuda = find_cuda()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        systems = [pybind11.get_include(), sysconfig.get_path("include")]
        flags = f"{FLAGS} {os.environ.get('CXXFLAGS', '')}"
        variables = [f"cxx = {os.environ.get('CXX', 'g++')}"]
        rules = {".cpp": "compile"}
        if cuda is not None:
            systems.append(str(cuda.home / "include"))
            flags += " -DMOETION_WITH_CUDA"
            variables += [f"nvcc = '{cuda.nvcc}'", f"nvcc_flags = {NVCC_FLAGS} {cuda.targets()}"]
            variables += [f"libraries = {cuda.libraries()}"]
            rules[".cu"] = "compile_cuda"
            print(f"[moetion] building the CUDA kernels with {cuda.nvcc}: {cuda.targets()}", flush=True)
        variables += [f"flags = {flags}", "includes = " + " ".join(f"-isystem '{path}'" for path in systems)]
        objects = {s.replace("/", "_") + ".o": Path(s).resolve() for s in ext.sources if Path(s).suffix in rules}
        lines = [*variables, RULES]
        lines += [f"build {name}: {rules[path.suffix]} {escaped(path)}" for name, path in objects.items()]
        lines += [f"build {escaped(target)}: link {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


sources = sorted(glob("csrc/**/*.c*", recursive=True))
setup(ext_modules=[Extension("megatron_moetion._C", sources)], cmdclass={"build_ext": NinjaBuild})
