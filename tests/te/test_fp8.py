# SPDX-License-Identifier: Apache-2.0
"""Quantised parameters after a recovery: every replica's bytes and scales are those of a run without a fault.

Real Transformer Engine modules, DDP and distributed optimizers on four ranks; the kernels that quantise are twins.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("dist", "unit")]

# isort: split
import fp8_twins
import transformer_engine.pytorch as te
from jobs import Nursery
from transformer_engine.common import recipe

from megatron_moetion.mcore.quantised import payload, quantised_class

pytestmark = pytest.mark.timeout(900)

PARTS = {
    "mxfp8": ("MXFP8Tensor", ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")),
    "tensorwise": ("Float8Tensor", ("_data", "_scale_inv", "_transpose")),
    "blockwise": (
        "Float8BlockwiseQTensor",
        ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"),
    ),
    "delayed": ("Float8Tensor", ("_data", "_scale_inv", "_transpose")),
}
ROWS = {
    "mxfp8": "MXFP8",
    "tensorwise": "FP8, current scaling",
    "blockwise": "FP8, block scaling",
    "delayed": "FP8, delayed scaling",
}
CASES = (
    "mxfp8", "mxfp8, overlapped", "mxfp8, bf16 parameters", "tensorwise", "tensorwise, overlapped", "blockwise",
    "blockwise, overlapped", "delayed", "delayed, overlapped", "delayed, bf16 parameters",
)  # fmt: skip
QUANTISED = tuple(case for case in CASES if "bf16" not in case)
REPLAYED = ("mxfp8, overlapped", "tensorwise", "blockwise, overlapped", "delayed")


def row(case: str) -> str:
    """The feature that a case is a proof of."""
    name, *rest = case.split(", ")
    return ", ".join([ROWS[name] + ("" if "bf16 parameters" in rest else " parameters"), *rest])


def proofs(cases: tuple[str, ...], level: str, more: str = "") -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.proves(row(case) + more, level)) for case in cases]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank noted of all cases."""
    folder = tmp_path_factory.mktemp("fp8")
    with Nursery("fp8", start_limit_s=300) as nursery:
        return nursery.notes(500, folder)


def of(notes: list[list[dict[str, Any]]], event: str, case: str) -> list[dict[str, Any]]:
    """The ranks' findings of one kind in one case."""
    return [next(n for n in of_rank if n["event"] == event and n.get("name") == case) for of_rank in notes]


@pytest.mark.parametrize("case", proofs(CASES, "recovery"))
def test_every_replica_is_what_it_was_and_so_is_all_state(notes: list[list[dict[str, Any]]], case: str) -> None:
    """Right after the recovery, where nobody else gathers, and two steps later."""
    for found in of(notes, "case", case):
        assert found["again"] == found["images"]
        assert found["hashes_again"] == found["hashes"]
        assert found["images"][0] != found["images"][1], "parameters are trained"
        assert found["moved"] is None
        kept = [k for k, v in found["images"][0].items() if found["spoilt"][k] == v]
        assert kept == [], "nothing may be left as it was"


@pytest.mark.parametrize("case", QUANTISED)
def test_what_is_compared_is_all_that_a_quantised_parameter_has(notes: list[list[dict[str, Any]]], case: str) -> None:
    cls, parts = PARTS[case.split(",")[0]]
    for found in of(notes, "case", case):
        assert found["quantised"] == [cls]
        for weight in ("dense.weight", "out.weight", "experts.weight0", "experts.weight1"):
            names = {
                k.removeprefix(f"module.{weight} ") for k in found["images"][0] if k.startswith(f"module.{weight} ")
            }
            assert names == set(parts), weight


@pytest.mark.parametrize("case", CASES)
def test_replicas_of_a_parameter_are_the_same_on_all_ranks_that_have_it(
    notes: list[list[dict[str, Any]]], case: str
) -> None:
    """Dense parameters on four ranks, experts on the two that share them."""
    ranks = of(notes, "case", case)
    for image in (found["again"][0] for found in ranks):
        for name, digest in image.items():
            if "experts" not in name:
                assert {found["again"][0][name] for found in ranks} == {digest}
    for pair in ((0, 2), (1, 3)):
        a, b = ({k: v for k, v in ranks[r]["again"][0].items() if "experts" in k} for r in pair)
        assert a == b
        assert a


@pytest.mark.parametrize("case", proofs(CASES, "inventory"))
def test_quantised_bytes_are_not_captured_and_main_values_are(notes: list[list[dict[str, Any]]], case: str) -> None:
    """12 bytes of state an element over all ranks that share it, whatever the parameters' format."""
    elements = 384 * 128 + 128 * 256 + 384 + 128 + 2 * 128 + 4 * 128
    experts = 2 * 2 * 256 * 128
    ranks = of(notes, "case", case)
    roles = {"MASTER", "EXP_AVG", "EXP_AVG_SQ"}
    for found in ranks:
        assert set(found["roles"]) == roles | ({"BUFFER"} if case.startswith("delayed") else set())
        scales = [t for t in found["tensors"] if "scaling_" in t]
        assert len(scales) == (12 if case.startswith("delayed") else 0), "of three modules, forward and backward"
    buffers = 4 * 4 * (3 + 1) * (3 + 2) * (1 + 1 + 2) if case.startswith("delayed") else 0
    total = sum(f["state_bytes"] for f in ranks)
    assert total == 12 * (elements + experts) + buffers


@pytest.mark.parametrize("case", ["mxfp8", "mxfp8, overlapped"])
def test_a_gather_of_memory_that_was_not_filled_is_seen_by_these_tests(
    notes: list[list[dict[str, Any]]], case: str
) -> None:
    for found in of(notes, "case", case):
        wrong = [k for k, v in found["images"][0].items() if "_data" in k and found["unstaged"][k] != v]
        assert wrong == [k for k in found["images"][0] if "_data" in k]
        assert found["gradients"] == 0.0, "gradients that share memory with the gather start from zero"


# -- mode exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_there_after_the_step_or_mode_exact_is_refused(
    notes: list[list[dict[str, Any]]], case: str, record_property: Callable[[str, object], None]
) -> None:
    """Only a step that gathers over them by itself is refused; a gather between step and ``on_step_end`` is seen."""
    for found in of(notes, "gradients", case):
        if case == "mxfp8":
            assert found["overwritten"] != []
            assert found["message"].startswith("--reuse-grad-buf-for-mxfp8-param-ag without --overlap-param-gather")
            record_property("message", found["message"])
            continue
        assert found["overwritten"] == []
        assert found["message"] == ""
        early = "gradients changed before on_step_end: zero them where a step begins"
        assert found["remarks"] == [None, early if case == "mxfp8, overlapped" else None]


@pytest.mark.parametrize("case", proofs(REPLAYED, "recovery", ", mode exact"))
def test_replayed_steps_give_the_same_parameters_on_every_rank(notes: list[list[dict[str, Any]]], case: str) -> None:
    for found in of(notes, "replayed", case):
        assert found["again"] == found["image"]
        assert found["hash_again"] == found["hash"]


# -- refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    "nothing": "",
    "frozen": "out.weight is a frozen MXFP8Tensor: no optimizer holds its values",
    "not gathered": "is a Float8Tensor and --fp8-param-gather with --use-distributed-optimizer is not in force",
    "overlap differs": "overlap_param_gather is True in OptimizerConfig and False in DistributedDataParallelConfig",
    "unknown module": "odd is a Odd, whose scales of delayed scaling MoEtion does not know how to find",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_quantised_parameters_that_could_not_be_made_again_are_refused(
    notes: list[list[dict[str, Any]]], kind: str
) -> None:
    for of_rank in notes:
        message = next(n for n in of_rank if n["event"] == "refused")[kind]
        assert REFUSED[kind] in message
        assert bool(message) == (kind != "nothing")


# -- the twins ----------------------------------------------------------------------------------------------------

RECIPES = {
    "mxfp8": recipe.MXFP8BlockScaling(),
    "tensorwise": recipe.Float8CurrentScaling(),
    "blockwise": recipe.Float8BlockScaling(),
    "delayed": recipe.DelayedScaling(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_twins_quantise_is_near_what_it_was(name: str) -> None:
    """To the precision of three bits of mantissa, and to nothing where values are far below the largest."""
    fp8_twins.install()
    with te.quantized_model_init(recipe=RECIPES[name], preserve_high_precision_init_val=True):
        weight = te.Linear(128, 256, params_dtype=torch.bfloat16, device="cuda").weight
    assert quantised_class(weight) == PARTS[name][0]
    assert all(t.isfinite().all() for t in payload(weight).values() if t.is_floating_point())
    with torch.no_grad():
        before, after = weight.get_high_precision_init_val().float(), weight.dequantize().float()
    largest = float(before.abs().max())
    assert 0 < float((before - after).abs().max()) < (largest / 16 if name != "delayed" else 2**-4)
    assert math.isclose(float(after.abs().max()), largest, rel_tol=0.07)
