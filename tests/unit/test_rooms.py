# SPDX-License-Identifier: Apache-2.0
"""The tree is the pipeline: a room stands above all that it imports, and pure rooms stay pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_moetion"
NAME = PACKAGE.name

FLOORS = [
    {"units", "framework", "coding", "config", "errors", "output", "clock", "arrays", "rendezvous", "ending", "_C"},
    {"observe"},
    {"store"},
    {"snapshot"},
    {"select"},
    {"plan"},
    {"replicate"},
    {"schedule"},
    {"recover"},
    {"persist"},
    {"modes"},
    {"run"},
    {"session"},
    {"sim"},
    {"mcore"},
    {"warm"},
    {"pretrain"},
    {"megatron_lm"},
    {"inspect"},
    {"export"},
    {"cli"},
]
"""From the ground up. ``mcore`` is a seam: it stands on the rooms, not among them."""

PURE = [
    "arrays.py",
    "coding.py",
    "units.py",
    "store/manifest.py",
    "store/population.py",
    "store/sheet.py",
    "store/spec.py",
    "store/chains.py",
    "store/retention.py",
    "select/rotation.py",
    "snapshot/gradlog.py",
    "select/book.py",
    "select/budget.py",
    "select/policies.py",
    "select/popularity.py",
    "select/shares.py",
    "snapshot/plan.py",
    "observe/lanes.py",
    "observe/notes.py",
    "schedule/planner.py",
    "schedule/sizes.py",
    "schedule/timeline.py",
    "replicate/placement.py",
    "replicate/substitutes.py",
    "replicate/survival.py",
    "replicate/agreement.py",
    "replicate/notes.py",
    "recover/plan.py",
    "recover/report.py",
    "recover/capacity.py",
    "pretrain/flags.py",
    "modes/choices.py",
    "inspect/judge.py",
    "mcore/boxes.py",
    "plan/costs.py",
    "plan/advice.py",
    "plan/choice.py",
    "plan/parallel.py",
    "plan/presets.py",
    "plan/shape.py",
    "sim/checker.py",
    "sim/galois.py",
    "sim/reader.py",
    "sim/truth.py",
]
IMPURE_MODULES = {
    "torch", "time", "os", "random", "megatron", "threading", "socket", "subprocess",
    "asyncio", "concurrent", "ctypes", "fcntl", "mmap", "multiprocessing", "pathlib", "psutil", "queue", "select",
    "shutil", "signal", "tempfile",
}  # fmt: skip
COMPILED = f"{NAME}._C"
MEGATRON_ROOMS = {"pretrain", "mcore", "megatron_lm"}


def files() -> list[str]:
    return sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


def imports(file: str) -> Iterator[str]:
    """Dotted names that a file imports; ``TYPE_CHECKING`` blocks do not count."""
    tree = ast.parse((PACKAGE / file).read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(name: str) -> Iterator[str]:
    """The files of the package that run when a dotted name is imported: rooms' ``__init__``, then the module's own.

    The package's ``__init__`` is left out: it loads the runtime on the first use of it, and nothing before.
    """
    package, *rest = name.split(".")
    for depth in range(1, len(rest) + 1 if package == NAME else 0):
        stem = "/".join(rest[:depth])
        yield from (f for f in (f"{stem}/__init__.py", f"{stem}.py") if (PACKAGE / f).is_file())


def reached(file: str) -> dict[str, str]:
    """All names that a file and the package's files behind its imports import, and over which files each is reached."""
    ways, todo, found = {file: file}, [file], dict[str, str]()
    while todo:
        here = todo.pop()
        for name in imports(here):
            found.setdefault(name, ways[here])
            for there in files_of(name):
                if there not in ways:
                    ways[there] = f"{ways[here]} -> {there}"
                    todo.append(there)
    return found


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("file", [f for f in files() if f != "__init__.py"])
def test_no_arrow_runs_back_up(file: str) -> None:
    room = file.split("/")[0].removesuffix(".py")
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == NAME and len(parts) > 1 and parts[1] != "__version__":
            assert floor(parts[1]) <= floor(room), f"{file} imports {name}, which stands above it"


@pytest.mark.parametrize("file", PURE)
def test_pure_rooms_reach_nothing_with_effects(file: str) -> None:
    ways = reached(file)
    impure = {n: way for n, way in ways.items() if n.split(".")[0] in IMPURE_MODULES or n == COMPILED}
    assert not impure, f"{file} is not pure: it reaches {impure}"


def test_imports_of_imports_are_followed() -> None:
    """The survey reads files with the compiled kernels: what it reaches over other files is found."""
    ways = reached("recover/survey.py")
    assert {COMPILED, "mmap", "torch"} <= ways.keys()
    assert ways["mmap"].startswith("recover/survey.py -> recover/opened.py -> store/node.py -> store/")


@pytest.mark.parametrize("file", [f for f in files() if f.startswith("pretrain/")])
def test_the_trainer_has_no_circle_of_imports(file: str) -> None:
    """Imports inside functions count: those of the trainer are there to start early, or without what is not needed.

    ``launch`` imports torch, the CPU device, engine names and the loop once it has chosen a device, and the placement
    only with ``--moetion``; ``loop`` and ``model`` import the runtime only with it, ``report`` TensorBoard where asked.
    """
    back = {name: way for name, way in reached(file).items() if file in files_of(name)}
    assert not back, f"{file} imports itself: {back}"


@pytest.mark.parametrize("file", files())
def test_megatron_is_known_to_the_seams_only(file: str) -> None:
    if file.split("/")[0] not in MEGATRON_ROOMS:
        assert "megatron" not in {n.split(".")[0] for n in imports(file)}


@pytest.mark.parametrize("file", files())
def test_the_executors_alone_know_the_compiled_module(file: str) -> None:
    if file not in ("snapshot/packer.py", "snapshot/device.py", "snapshot/engines.py", "snapshot/digest.py"):
        assert COMPILED not in set(imports(file))


OWN_GROUPS = r"(self\.)?_?[a-z]+"
"""How a group of our own is named in a call: a variable or an attribute, not something of training's objects."""


def collectives(file: str) -> Iterator[ast.Call]:
    """Calls of torch.distributed in which other ranks take part."""
    names = {
        "all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_to_all", "all_to_all_single",
        "barrier", "broadcast", "broadcast_object_list", "gather_object", "irecv", "isend", "monitored_barrier", "recv",
        "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter_object_list", "send",
    }  # fmt: skip
    callees = {f"{module}.{name}" for module in ("dist", "torch.distributed") for name in names}
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in callees:
            yield node


@pytest.mark.parametrize("file", [f for f in files() if f.split("/")[0] != "pretrain"])
def test_the_runtime_never_speaks_in_a_group_of_trainings(file: str) -> None:
    """Where a rank of ours fails alone, training's next collective would be paired with ours."""
    for call in collectives(file):
        groups = [ast.unparse(k.value) for k in call.keywords if k.arg == "group"]
        assert groups, f"{file}:{call.lineno} speaks in the default group, which is training's"
        assert re.fullmatch(OWN_GROUPS, groups[0]), f"{file}:{call.lineno} speaks in {groups[0]}"


@pytest.mark.parametrize("file", [f for f in files() if f.split("/")[0] not in ("mcore", "pretrain")])
def test_nothing_is_drawn_from_the_generators_of_training(file: str) -> None:
    """They are captured and put back: a draw of ours, at a moment of its own, would make every run another one."""
    drawn = [
        f"{file}:{node.lineno}"
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("random", "np.random", "torch.random")
        and node.attr not in ("Random", "SystemRandom", "Generator", "default_rng")
    ]
    assert not drawn
