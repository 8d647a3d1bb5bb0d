#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is needed into .venv, then runs the test suite.
#
#   scripts/test.sh [pytest arguments]    for instance: scripts/test.sh tests/unit -k manifest
#
# PYTHON=python3.12 scripts/test.sh runs it on another Python, in .venv-3.12 and with the megatron-core that is tested
# there: 0.16.1 below Python 3.12, 0.19.2 from 3.12 on.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
set_up dev
exec "$VENV_PYTHON" -m pytest -q "$@"
