# SPDX-License-Identifier: Apache-2.0
"""No line of the package unpickles or executes what it reads (G7). Megatron's and torch's own calls are theirs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_moetion"
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

MODULES = {"cloudpickle", "copyreg", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "_pickle", "yaml"}
OBJECT_COLLECTIVES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list",
    "send_object_list",
}  # fmt: skip
BUILTINS = {"compile", "eval", "exec"}
WRITERS = {("mcore/torch_dist.py", "pickle.dump")}
"""What torch's format of checkpoints asks to be written; it is not read here."""


def risks(source: str, file: str = "") -> Iterator[str]:
    """What could execute bytes that somebody else wrote."""
    tree = ast.parse(source)
    dumps = {call for where, call in WRITERS if where == file}
    written = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in dumps
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"{file}:{node.lineno} imports from {node.module}"
        elif isinstance(node, ast.Import) and not dumps:
            yield from (f"{file}:{node.lineno} imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Attribute | ast.Name):
            yield from (f"{file}:{node.lineno} {why}" for why in _of_name(node) if id(node) not in written)
        elif isinstance(node, ast.Call):
            yield from (f"{file}:{node.lineno} {why}" for why in _of_call(node))


def _of_name(node: ast.Attribute | ast.Name) -> Iterator[str]:
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
    if name in OBJECT_COLLECTIVES:
        yield f"uses {name}, which unpickles what peers send"
    if owner in MODULES:
        yield f"uses {owner}.{name}"


def _of_call(node: ast.Call) -> Iterator[str]:
    called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in BUILTINS:
        yield f"calls {called}"
    if called == "torch.load" and options.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
        yield f"calls {called} with allow_pickle"


def test_nothing_that_is_read_is_executed() -> None:
    assert "pretrain/checkpoint.py" in FILES
    assert not [risk for file in FILES for risk in risks((PACKAGE / file).read_text(), file)]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from multiprocessing.reduction import x; import dill",
        "dist.all_gather_object(found, mine, group=group)",
        "torch.distributed.broadcast_object_list(found, src=0)",
        "from torch.distributed import scatter_object_list as s; s2 = scatter_object_list",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_what_comes_back_is_found(line: str) -> None:
    assert list(risks(line))


def test_the_one_writer_may_write_and_no_more() -> None:
    file = "mcore/torch_dist.py"
    assert not list(risks("import pickle\npickle.dump(table, file)", file))
    assert list(risks("import pickle\npickle.load(file)", file))
    assert list(risks("import pickle\nread = pickle.loads", file))


def test_what_is_safe_is_not_found() -> None:
    assert not list(
        risks("torch.load(path, weights_only=True); np.load(path); dist.all_gather(found, mine); re.compile(x)")
    )
