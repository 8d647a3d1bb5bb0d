# SPDX-License-Identifier: Apache-2.0
"""What is replaced in Megatron's training loop, and when that is refused. Doubles stand for its modules."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.megatron_lm import install, seams
from megatron_moetion.megatron_lm.__main__ import run, run_script

TRAIN = "forward_step_func, model, optimizer, opt_param_scheduler, train_data_iterator, checkpointing_context"
SIGNATURES = {
    "arguments": {"add_megatron_arguments": "parser"},
    "initialize": {"_initialize_distributed": "get_embedding_ranks, get_position_embedding_ranks, store"},
    "training": {
        "setup_model_and_optimizer": "model_provider_func, model_type, checkpointing_context=None",
        "train": TRAIN,
        "train_step": "forward_step_func, data_iterator",
        "dummy_train_step": "data_iterator",
        "checkpoint_and_decide_exit": "model, iteration, num_floating_point_operations_so_far",
        "save_checkpoint_and_time": "iteration, model, non_persistent_ckpt=False, train_data_iterator=None",
        "get_forward_backward_func": "",
        "get_args": "",
        "load_checkpoint": "ddp_model, checkpointing_context=None",
        "save_checkpoint": "iteration, checkpointing_context=None, train_data_iterator=None",
        "update_num_microbatches": "consumed_samples, consistency_check=True, verbose=False",
    },
}
"""As of 0.16; 0.19 has more arguments, and others first."""
NEWER = {
    "setup_model_and_optimizer": "model_type, model_provider_func=None, checkpointing_context=None, *, cfg=None",
    "train": f"{TRAIN}, p2p_communicator=None, pg_collection=None",
    "get_forward_backward_func": "schedule_pg_collection=None",
}


def function(signature: str) -> Callable[..., Any]:
    made: Callable[..., Any] = eval(f"lambda {signature}: 'original'")
    return made


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The modules of a Megatron-LM by their last names."""
    changed = getattr(request, "param", {})
    found = {}
    monkeypatch.setitem(sys.modules, "megatron.training", types.ModuleType("megatron.training"))
    for name, functions in SIGNATURES.items():
        module: Any = types.ModuleType(f"megatron.training.{name}")
        for each, signature in functions.items():
            setattr(module, each, function(changed.get(each, signature)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found[name] = module
    return found


def functions(megatron: dict[str, Any]) -> dict[str, Any]:
    return {f"{m}.{name}": getattr(megatron[m], name) for m in megatron for name in SIGNATURES[m]}


@pytest.mark.parametrize("megatron", [{}, NEWER], indirect=True, ids=["0.16", "0.19"])
def test_exactly_the_listed_functions_are_replaced_and_once(megatron: dict[str, Any]) -> None:
    before = functions(megatron)
    install()
    after = functions(megatron)
    listed = {path.removeprefix("megatron.training.").replace(":", ".") for path in seams.REPLACED}
    assert {name for name in before if after[name] is not before[name]} == listed
    install()
    assert functions(megatron) == after


@pytest.mark.parametrize("megatron", [{}, NEWER], indirect=True, ids=["0.16", "0.19"])
def test_without_the_flag_calls_reach_megatron_as_they_were(megatron: dict[str, Any]) -> None:
    megatron["training"].get_args = lambda: argparse.Namespace(moetion=False)
    install()
    training = megatron["training"]
    assert megatron["initialize"]._initialize_distributed(None, None, None) == "original"
    assert training.setup_model_and_optimizer("a", "b") == "original"
    assert training.train(*"abcdef") == "original"
    assert training.train_step(1, 2) == training.dummy_train_step(1) == "original"
    assert training.checkpoint_and_decide_exit([], 1, 2) == training.get_forward_backward_func() == "original"


def test_the_parser_gets_the_flags(megatron: dict[str, Any]) -> None:
    megatron["arguments"].add_megatron_arguments = lambda parser: parser
    install()
    parser = megatron["arguments"].add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = parser.parse_args(["--moetion", "--moetion-mode", "exact"])
    assert (flags.moetion, flags.moetion_mode) == (True, "exact")


def test_flags_without_the_first_are_a_mistake(megatron: dict[str, Any]) -> None:
    megatron["training"].get_args = lambda: argparse.Namespace(moetion=False, moetion_mode="full")
    install()
    with pytest.raises(ConfigError, match="--moetion-mode given without --moetion") as caught:
        megatron["initialize"]._initialize_distributed(None, None, None)
    assert caught.value.shared


@pytest.mark.parametrize(
    ("megatron", "problem"),
    [
        ({}, "no function train_step in megatron.training.training"),
        ({"checkpoint_and_decide_exit": "iteration"}, "takes no 'num_floating_point_operations_so_far'"),
    ],
    indirect=["megatron"],
)
def test_another_version_is_refused_with_all_that_is_missing(megatron: dict[str, Any], problem: str) -> None:
    del megatron["arguments"].add_megatron_arguments
    if problem.startswith("no function"):
        del megatron["training"].train_step
    before = vars(megatron["training"]).copy()
    with pytest.raises(UnsupportedState, match="no function add_megatron_arguments") as caught:
        install()
    assert problem in str(caught.value)
    assert vars(megatron["training"]) == before, "nothing is replaced by halves"


def test_without_megatron_lm_it_says_where_that_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SIGNATURES:
        monkeypatch.setitem(sys.modules, f"megatron.training.{name}", None)
    with pytest.raises(ConfigError, match="run the script from a Megatron-LM checkout"):
        install()


def test_a_script_is_run_as_python_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own folder first in the path, its own arguments, and untouched where it asks for nothing."""
    (tmp_path / "beside.py").write_text("def add(a, b):\n    return a + b\n")
    script = tmp_path / "pretrain_own.py"
    script.write_text(
        "import sys, pathlib\nfrom beside import add\n"
        "assert __name__ == '__main__' and add(1, 2) == 3\n"
        "loaded = [m for m in sys.modules if m.startswith('megatron.training')]\n"
        "pathlib.Path('said.txt').write_text(f'{sys.argv[1:]} {loaded}')\n"
    )
    code = f"from megatron_moetion.megatron_lm.__main__ import run; print(run([{str(script)!r}, '--lr', '1']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "0\n"
    assert (tmp_path / "said.txt").read_text() == "['--lr', '1'] []"


@pytest.mark.parametrize("argv", [[], ["nowhere.py", "--moetion"]])
def test_a_missing_script_is_one_line_and_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="SCRIPT being"):
        run_script(argv)
    assert run(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m megatron_moetion.megatron_lm SCRIPT")


def test_installing_loads_nothing_of_the_runtime() -> None:
    """A run without ``--moetion`` that calls ``install()`` has the flags, and neither rooms nor kernels."""
    rooms = ["store", "replicate", "recover", "snapshot", "run", "modes", "select", "schedule", "session", "_C"]
    code = (
        "import sys, megatron_moetion.megatron_lm.adapter\n"
        f"rooms = ['megatron_moetion.' + room for room in {rooms}]\n"
        "print([m for m in sys.modules if any(m == r or m.startswith(r + '.') for r in rooms)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
