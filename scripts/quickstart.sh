#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is needed into .venv, then trains a small MoE GPT, loses one of its two nodes half-way, and shows
# that training goes on as if nothing had happened. Results: out/quickstart/.
#
#   scripts/quickstart.sh [--quick]    --quick: fewer iterations
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
set_up run
exec "$VENV_PYTHON" scripts/quickstart.py "$@"
