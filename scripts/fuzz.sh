#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fuzzes the readers of arenas, frames, documents and notes at length. One process at a time.
#
#   scripts/fuzz.sh [TARGET ...] [--executions N] [--seconds S] [--json PATH] [--findings FOLDER]
#
# Without targets all of them, 1,000,000 executions each. Inputs that fail are written to the folder (out/findings):
# put them into tests/fuzz/corpus/TARGET when they are mended.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
set_up dev
"$VENV_PYTHON" -c 'import atheris' 2>/dev/null ||
  logged "installing atheris" pip_install "$(sed -n 's/^ *"\(atheris[^"]*\)".*/\1/p' pyproject.toml)"
exec "$VENV_PYTHON" tests/fuzz/campaign.py "$@"
