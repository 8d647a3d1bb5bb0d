# SPDX-License-Identifier: Apache-2.0
"""The translation of PTX into C++: what is known, and that what is not known is refused by name."""

from __future__ import annotations

import pytest
from ptx_to_cpp import PtxError, translate


def kernel(*statements: str) -> str:
    """PTX of a kernel with a few registers of each kind."""
    body = "\n".join(f"\t{statement};" for statement in statements)
    registers = ".reg .pred %p<3>;\n.reg .b16 %rs<3>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;"
    head = ".visible .entry copy(\n.param .u64 copy_param_0\n)\n.maxntid 256, 1, 1\n"
    return f".version 9.0\n{head}{{\n{registers}\n{body}\n\tret;\n}}\n"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("add.s32 %r1, %r2, -8", "v_r1_b32 = static_cast<uint32_t>(static_cast<uint32_t>(v_r2_b32) + "),
        ("setp.lt.s64 %p1, %rd1, %rd2", "static_cast<int64_t>(v_rd1_b64) < static_cast<int64_t>(v_rd2_b64)"),
        ("@!%p1 bra $L__BB0_2", "if (!static_cast<bool>(v_p1_pred)) { goto label_L__BB0_2; }"),
        ("ld.param.u64 %rd1, [copy_param_0+40]", "emulator::parameter<uint64_t>(lane, 40)"),
        ("ld.global.cs.v2.u64 {%rd1,%rd2}, [%rd3+16]", "load_pair<uint64_t>(lane, v_rd3_b64 + UINT64_C(16), "),
        ("st.global.u8 [%rd1], %rs2", "emulator::store<uint8_t>(lane, v_rd1_b64 + UINT64_C(0), "),
        ("mov.u32 %r1, %smid", "static_cast<uint32_t>(lane.sm)"),
        ("{ .reg .b32 tmp; mov.b64 {tmp, %r4}, %rd5; }", "v_r4_b32 = static_cast<uint32_t>("),
        ("shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 31, -1", "v_r1_b32 = emulator::shuffle_butterfly(lane, "),
        ("mul.hi.s64 %rd1, %rd2, 3", "(static_cast<__int128>(static_cast<int64_t>(v_rd2_b64)) * "),
    ],
)
def test_an_instruction_becomes_a_statement(statement: str, expected: str) -> None:
    assert expected in translate(kernel(statement), "any")


def test_a_kernel_is_registered_with_its_name_and_its_largest_block() -> None:
    assert '{"compute_90", "copy", kernel_0, 256}' in translate(kernel(), "compute_90")


@pytest.mark.parametrize(
    "statement",
    [
        "bar.sync 0",
        "add.f32 %r1, %r2, %r3",
        "ld.shared.u32 %r1, [%rd1]",
        "shfl.sync.down.b32 %r1|%p1, %r2, 16, 31, -1",
        "setp.lt.and.s64 %p1, %rd1, %rd2, %p2",
        "mov.u32 %r1, %laneid",
        "atom.global.max.u64 %rd1, [%rd2], %rd3",
        "add.s32 %r1, %r2, %r99",
    ],
)
def test_an_unknown_instruction_is_refused_by_name(statement: str) -> None:
    with pytest.raises(PtxError, match="unknown instruction in copy: ") as refusal:
        translate(kernel(statement), "any")
    assert statement.split()[0] in str(refusal.value)


def test_a_file_without_kernels_is_refused() -> None:
    with pytest.raises(PtxError, match="there is no kernel"):
        translate(".version 9.0\n", "any")
