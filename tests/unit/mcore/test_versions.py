# SPDX-License-Identifier: Apache-2.0
"""What is said of a megatron-core that is not tested, and of one without a name that a run needs.

``attach`` asks for all names in a job of real objects; ``tests/dist/test_inventory.py`` has several such jobs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import parallel_state, utils
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.router import TopKRouter

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore import versions
from megatron_moetion.mcore.versions import ATTRIBUTES, FUNCTIONS, TESTED, installed, require_names

ROOT = Path(__file__).resolve().parents[3]

# -- versions ------------------------------------------------------------------------------------------------------


def test_the_installed_version_is_known() -> None:
    assert installed() == importlib.metadata.version("megatron-core")


def test_versions_that_are_not_tested_are_spoken_of_also_between_the_tested_ones() -> None:
    assert all(versions.version_note(version) is None for version in (*TESTED, "0.19.0rc1", "0.16", installed()))
    for version in ("0.15.3", "0.17.1", "0.18.0rc0", "0.20.0", "0.1", "0.160", "1.0", "of an unknown version"):
        said = f"megatron-core {version} is not tested with MoEtion: 0.16.1 and 0.19.2 are"
        assert versions.version_note(version) == said


def test_range_and_versions_are_those_of_the_package_and_its_requirements() -> None:
    minors = [int(version.split(".")[1]) for version in TESTED]
    assert f'"megatron-core>=0.{min(minors)},<0.{max(minors) + 1}"' in (ROOT / "pyproject.toml").read_text()
    pinned = [path.read_text() for path in sorted((ROOT / "requirements").glob("megatron-*.txt"))]
    assert [re.findall(r"^megatron-core==(.*)$", text, re.MULTILINE) for text in pinned] == [[v] for v in TESTED]


def test_a_name_that_cannot_be_imported_is_said_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "get_model_config")
    said = rf"'get_model_config' .*this is megatron-core {installed()}, and MoEtion is tested with 0.16.1 and 0.19.2"
    with pytest.raises(ImportError, match=said):
        runpy.run_path(str(ROOT / "megatron_moetion" / "mcore" / "attach.py"))


def test_of_other_imports_nothing_is_added() -> None:
    assert versions.import_problem(ImportError("no luck", name="rich")) == "no luck"
    assert versions.import_problem(ImportError("no luck")) == "no luck"


# -- names ---------------------------------------------------------------------------------------------------------


def thing(*kinds: str, called: str = "Thing", **parts: Any) -> Any:
    """A stand-in with all attributes of its kinds, of a class of this name."""
    return type(called, (), {name: None for kind in kinds for name in ATTRIBUTES[kind]} | parts)()


def run() -> tuple[list[Any], Any, Any]:
    """Model, optimizer and scheduler, with an object of each kind."""
    sharded, whole = (thing("settings of a model chunk", use_distributed_optimizer=on) for on in (True, False))
    modules = [
        thing("MoE layer", called="MoELayer", token_dispatcher=thing("token dispatcher")),
        thing("router", called="TopKRouter"),
        SimpleNamespace(),
    ]
    chunk = thing(
        "model chunk",
        config=thing("configuration"),
        ddp_config=sharded,
        bucket_groups=[thing("bucket group", "sharded bucket group", ddp_config=sharded, buckets=[thing("bucket")])],
        expert_parallel_bucket_groups=[
            thing("bucket group", "bucket group without shards", ddp_config=whole, buckets=[])
        ],
        modules=lambda _: modules,
    )
    links = [
        thing(
            "optimizer",
            kind,
            "optimizer with a loss scaler",
            called=name,
            is_stub_optimizer=False,
            config=thing("settings of an optimizer"),
            grad_scaler=thing("loss scaler"),
        )
        for name, kind in versions._OPTIMIZERS.items()
    ]
    stub = thing("optimizer", is_stub_optimizer=True)
    chain = thing("chain of optimizers", called="ChainedOptimizer", chained_optimizers=[*links, stub])
    return [chunk], chain, thing("scheduler")


def test_all_names_are_there() -> None:
    require_names(*run())
    assert {kind for kind, _ in versions._objects(*run())} == set(ATTRIBUTES), "an object of each kind"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ATTRIBUTES for name in ATTRIBUTES[kind]])
def test_each_attribute_is_missed(kind: str, name: str) -> None:
    given = run()
    for found, each in versions._objects(*given):
        if found == kind and name in vars(type(each)):
            delattr(type(each), name)
            break
    else:
        pytest.fail("no object has it")
    with pytest.raises(UnsupportedState, match=rf"megatron-core {installed()} .* has no '{name}'\. .*install one"):
        require_names(*given)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_each_function_is_missed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = path.partition(":")
    owner = importlib.import_module(f"megatron.core.{module}")
    *classes, last = name.split(".")
    for cls in classes:
        owner = getattr(owner, cls)
    monkeypatch.delattr(owner, last)
    with pytest.raises(UnsupportedState, match=rf"{name} (in|of) megatron.core.{module}"):
        require_names(*run())


def without(function: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """A function that takes all but one of the arguments that we give by name."""
    taken = [a for path, names in FUNCTIONS.items() if path.endswith(function.__name__) for a in names]
    return eval(f"lambda {', '.join(a for a in taken if a != argument)}: None")


@pytest.mark.parametrize(
    ("owner", "name", "argument"),
    [
        (P2PCommunicator, "_communicate", "wait_on_reqs"),
        (P2PCommunicator, "_communicate", "tensor_send_next"),
        (TopKRouter, "routing", "padding_mask"),
        (parallel_state, "get_data_parallel_group", "partial_data_parallel"),
    ],
)
def test_an_argument_that_is_no_longer_taken_is_named(
    owner: Any, name: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, without(getattr(owner, name), argument))
    with pytest.raises(UnsupportedState, match=f"{name} of megatron.core.* takes no argument '{argument}'"):
        require_names(*run())


# -- the lists are complete ----------------------------------------------------------------------------------------

TORCH = {
    "_amp_foreach_non_finite_check_and_unscale_", "_buffers", "_foreach_add_", "_foreach_zero_", "_init_group",
    "_non_persistent_buffers_set", "_parameters",
}  # fmt: skip
"""Private names that are torch's."""
ENGINE = {"_data", "_scale_inv", "_scales"}
"""Those of Transformer Engine's tensors and optimizer, which no list is about."""
ELSEWHERE = ("cpu_adam.py", "cpu_device.py", "versions.py")
"""What stands in for a device does not run where there is one."""


def used() -> Iterator[str]:
    """Private names and functions of process groups that the room reads of what it has not made itself."""
    for path in sorted((ROOT / "megatron_moetion" / "mcore").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for node in nodes:
            if path.name in ELSEWHERE or not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if owner in ("parallel_state", "ProcessGroupCollection") or (
                private and owner not in ("self", "cls") and node.attr not in own
            ):
                yield node.attr


def test_every_private_name_of_megatron_is_in_a_list() -> None:
    listed = {name for names in ATTRIBUTES.values() for name in names} | {
        re.split("[:.]", path)[-1] for path in FUNCTIONS
    }
    found = set(used())
    assert {"_get_model_param_range_map", "get_pipeline_model_parallel_group", "_maintain_float32_expert_bias"} <= found
    assert sorted(found - listed - TORCH - ENGINE) == [], "add it to mcore/versions.py, or look it up where it exists"


def test_no_function_of_process_groups_is_asked_for_without_need() -> None:
    listed = {re.split("[:.]", path)[-1] for path in FUNCTIONS if path.startswith(("parallel_", "process_groups_"))}
    room = "".join(path.read_text() for path in (ROOT / "megatron_moetion").rglob("*.py") if path.name != "versions.py")
    assert [name for name in sorted(listed) if not re.search(rf"\b{name}\(", room)] == []
