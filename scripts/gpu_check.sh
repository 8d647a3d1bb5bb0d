#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that only a machine with an NVIDIA GPU can show: builds the CUDA kernels, runs their tests and a sanitizer,
# measures, trains on the GPU, kills the training and resumes it. Ends in a table; RESULTS/summary.json has the figures.
#
#   scripts/gpu_check.sh RESULTS [--only PART]... [--quick] [--offline] [--python PY] [--store DIR] [--slower FACTOR]
#
# RESULTS is a folder for logs and figures. `--only` runs one part; summary.json keeps the others of earlier calls.
#
# An interpreter that has all that is needed is used as it is: nothing is installed, and the extension is built in this
# folder. It is the one of --python, else of $PYTHON, else python3 on the path. One that lacks something makes .venv, and
# takes packages from a registry. With --offline, or MOETION_OFFLINE=1, it says in one line what is missing instead.
#
# --without-gpu, for trying the script itself, runs on the CPU and on a model of the device all parts that can.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"

arguments=()
on_gpu=1
offline=${MOETION_OFFLINE:-0}
while (($#)); do
  case $1 in
    --offline) offline=1 ;;
    --python)
      (($# > 1)) || die "--python needs an interpreter"
      PYTHON=$2
      shift
      ;;
    --python=*) PYTHON=${1#*=} ;;
    *)
      [[ $1 != --without-gpu ]] || on_gpu=0
      arguments+=("$1")
      ;;
  esac
  shift
done
if ((on_gpu)); then
  has_gpu || die "no NVIDIA GPU (nvidia-smi -L shows none); --without-gpu tries the script itself"
  export MOETION_CUDA=1
fi

python=${PYTHON:-python3}
missing=$(what_is_missing "$python" "$on_gpu")
if [[ -z $missing ]]; then
  use_as_it_is "$python"
elif ((offline)); then
  die "$python cannot run the check: $missing"
else
  say "$python cannot run the check as it is: $missing"
  choose_venv
  say "making $VENV from a package registry; --offline does without one"
  set_up dev
fi
export PYTHONPATH=$ROOT/scripts:$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec "$VENV_PYTHON" -m gpu_check "${arguments[@]}"
