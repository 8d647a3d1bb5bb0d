#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is needed into .venv, then runs the test suite.
#
#   scripts/test.sh                     all of it: two processes share tests of units, then one test runs at a time
#   scripts/test.sh PYTEST_ARGUMENTS    for instance: scripts/test.sh tests/unit -k manifest
#
# PYTHON=python3.12 scripts/test.sh runs it on another Python, in .venv-3.12 and with the megatron-core that is tested
# there: 0.16.1 below Python 3.12, 0.19.2 from 3.12 on.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
set_up dev
if (($#)); then
  exec "$VENV_PYTHON" -m pytest -q "$@"
fi
"$VENV_PYTHON" -m pytest -q -n 2 tests/unit tests/emulated_gpu
"$VENV_PYTHON" -m pytest -q --ignore=tests/unit --ignore=tests/emulated_gpu
