#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is needed into .venv, then runs the test suite.
#
#   scripts/test.sh [pytest arguments]    for instance: scripts/test.sh tests/unit -k manifest
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
set_up dev
exec "$VENV_PYTHON" -m pytest -q "$@"
