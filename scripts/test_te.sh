#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests of Transformer Engine's modules and optimizers, on the CPU. Nothing is installed.
#
#   scripts/test_te.sh PYTHON [pytest arguments]    for instance: scripts/test_te.sh /opt/te/bin/python -k grouped
#
# PYTHON is an interpreter with the packages of requirements/te.txt, a megatron-core and pytest.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
(($#)) || die "which Python? scripts/test_te.sh PYTHON [pytest arguments]"
python=$(command -v "$1") || die "there is no $1"
shift
cd -- "$ROOT"
libraries=$("$python" - <<'PY'
import pathlib
import sysconfig

found = pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib")
print(":".join(str(folder) for folder in sorted(found)))
PY
)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export MOETION_REQUIRE_TE=1 CUDA_VISIBLE_DEVICES=''
"$python" -c 'import megatron_moetion._C' 2>/dev/null || use_as_it_is "$python"
[[ $* == *tests/* ]] || set -- "$@" tests/te
exec "$python" -m pytest -q "$@"
