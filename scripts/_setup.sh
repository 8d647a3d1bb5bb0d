# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# Sourced by quickstart.sh, test.sh, gpu_check.sh and .ci/run: makes an environment, installs the pinned requirements,
# builds csrc/. Each step leaves a stamp with the hash of its inputs, so that a second call takes a second.
#
#   set_up run|dev    installs requirements/tested.txt and megatron-core, or requirements/dev.txt too
#
# Settings: PYTHON (interpreter that makes the environment, default python3), MOETION_VENV (its folder, default .venv, or
# .venv-3.12 where PYTHON names a Python 3.12), MOETION_CUDA=auto|0|1 (see setup.py), CXX (compiler).

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '[setup] %s\n' "$*"; }

die() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 2
}

# Runs a command with its output in the log; if it fails, shows the end of the log and stops.
logged() {
  local what=$1 started=$SECONDS
  shift
  say "$what ..."
  {
    printf '\n== %s\n' "$what"
    "$@"
  } >>"$SETUP_LOG" 2>&1 || {
    tail -n 25 -- "$SETUP_LOG" >&2
    die "$what failed; the end of $SETUP_LOG is above"
  }
  say "$what: $((SECONDS - started)) s"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Where the environment is. Each version of a Python that PYTHON names has a folder of its own: what one has built and
# installed is of no use to another.
choose_venv() {
  local version='' found
  if [[ -n ${PYTHON:-} ]]; then
    version=$(version_of "$PYTHON") || die "PYTHON: $PYTHON does not run"
  fi
  VENV=${MOETION_VENV:-$ROOT/.venv${version:+-$version}}
  VENV_PYTHON=$VENV/bin/python
  SETUP_LOG=$VENV/setup.log
  found=$(version_of "$VENV_PYTHON" || true)
  if [[ -n $version && -n $found && $version != "$found" ]]; then
    die "$VENV has Python $found, and PYTHON ($PYTHON) is $version: set MOETION_VENV to another folder, or delete this one"
  fi
}

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Version of the torch that an interpreter sees, if it is within the range of pyproject.toml.
usable_torch() {
  "$1" - 2>/dev/null <<'PY'
import importlib.metadata as metadata
version = metadata.version("torch")
if tuple(int(part) for part in version.split(".")[:2]) >= (2, 6):
    print(version)
PY
}

check_machine() {
  local python=$1 compiler found='' version package
  command -v "$python" >/dev/null 2>&1 || die "$python is missing: apt install python3 python3-venv python3-dev"
  version=$("$python" -c 'import platform; print(platform.python_version())') || die "$python does not run"
  python_is_new_enough "$python" || die "Python 3.10 or newer is needed, $python is $version; set PYTHON to another"
  package=python${version%.*}
  "$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python's venv is missing: apt install $package-venv"
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "Python's headers are missing: apt install $package-dev"
  for compiler in "${CXX:-}" g++ clang++ c++; do
    if [[ -n $compiler ]] && $compiler -std=c++17 -x c++ -fsyntax-only - <<<'#include <thread>' 2>/dev/null; then
      found=$compiler
      break
    fi
  done
  [[ -n $found ]] || die "a C++17 compiler is missing: apt install g++"
  export CXX=$found
  say "Python $version, $found $($found -dumpversion), $(env -u OMP_NUM_THREADS nproc) cores"
}

make_venv() {
  local python=$1 options=() system_torch
  [[ -x $VENV_PYTHON ]] && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 && return
  # A container for GPUs brings its own torch, built for its CUDA: use that one.
  system_torch=$(usable_torch "$python" || true)
  if has_gpu && [[ -n $system_torch ]]; then
    say "using torch $system_torch of $python"
    options=(--system-site-packages)
  fi
  rm -rf -- "$VENV"
  mkdir -p -- "$VENV"
  logged "making $VENV" "$python" -m venv "${options[@]}" "$VENV"
  # The site packages of a virtual environment are not those of the system, which the option above shows.
  if [[ -n ${options[*]} && -z $(usable_torch "$VENV_PYTHON" || true) ]]; then
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth"
  fi
}

pip_install() { "$VENV_PYTHON" -m pip install --quiet --retries 5 --no-warn-script-location "$@"; }

# The CPU build where there is no GPU, if an index that pip is configured with has it (PIP_EXTRA_INDEX_URL); else the
# default build, which brings gigabytes of CUDA libraries and runs on the CPU all the same.
install_torch() {
  local wanted=$1
  if has_gpu; then
    pip_install "torch==$wanted"
  else
    pip_install "torch==$wanted+cpu" || pip_install "torch==$wanted"
  fi
}

# The newest tested megatron-core that this Python can have.
megatron_requirements() {
  if "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    echo megatron-0.19
  else
    echo megatron-0.16
  fi
}

install_requirements() {
  local profile=$1 wanted installed files=(build tested)
  files+=("$(megatron_requirements)")
  [[ $profile == dev ]] && files+=(dev)
  wanted=$(sed -n 's/^torch==//p' "$ROOT/requirements/tested.txt")
  installed=$(usable_torch "$VENV_PYTHON" || true)
  if [[ -z $installed ]]; then
    logged "installing torch $wanted" install_torch "$wanted"
  elif [[ ${installed%%+*} != "$wanted" ]]; then
    say "keeping torch $installed; the tested version is $wanted"
  fi
  (cd -- "$ROOT/requirements" && cat -- "${files[@]/%/.txt}") | grep -v -e '^-r ' -e '^torch==' >"$VENV/$profile.txt"
  logged "installing the pinned requirements ($profile)" pip_install -r "$VENV/$profile.txt"
}

version_of_megatron() { "$VENV_PYTHON" -c 'import importlib.metadata as m; print(m.version("megatron-core"))'; }

extension_name() { "$VENV_PYTHON" -c 'import sysconfig; print("_C" + sysconfig.get_config_var("EXT_SUFFIX"))'; }

build_package() { pip_install --no-build-isolation --no-deps --editable "$ROOT"; }

# Hash of the named files' names and contents, of the interpreter and of the settings of the build.
fingerprint() {
  {
    "$VENV_PYTHON" -VV
    printf '%s\n' "$ROOT" "${MOETION_CUDA:-auto}" "${CXXFLAGS:-}"
    (cd -- "$ROOT" && find "$@" -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
  } | sha256sum
}

is_stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# One line that names what an interpreter lacks for gpu_check; empty if nothing.
what_is_missing() {
  local python=$1 cuda=$2
  command -v "$python" >/dev/null 2>&1 || {
    printf 'there is no %s (--python PY)\n' "$python"
    return
  }
  python_is_new_enough "$python" || {
    printf 'Python 3.10 or newer is needed (--python PY)\n'
    return
  }
  "$python" "$ROOT/scripts/_needs.py" "$cuda"
}

# Builds the extension in this folder, for an interpreter that has all that is needed; installs nothing.
use_as_it_is() {
  local started=$SECONDS compiler lock
  VENV_PYTHON=$(command -v "$1")
  SETUP_LOG=$ROOT/build/setup.log
  cd -- "$ROOT" || exit
  mkdir -p -- "$ROOT/build"
  exec {lock}<"$ROOT"
  flock "$lock"
  for compiler in "${CXX:-}" g++ clang++ c++; do
    if [[ -n $compiler ]] && command -v "$compiler" >/dev/null 2>&1; then
      export CXX=$compiler
      break
    fi
  done
  logged "building csrc/" "$VENV_PYTHON" setup.py build_ext --inplace
  exec {lock}<&-
  say "ready: $VENV_PYTHON, $("$VENV_PYTHON" -VV | head -n 1) ($((SECONDS - started)) s)"
}

set_up() {
  local profile=$1 python=${PYTHON:-python3} started=$SECONDS stamp lock
  choose_venv
  cd -- "$ROOT" || exit
  exec {lock}<"$ROOT"
  flock "$lock" # two scripts at once: the second waits for the first
  if [[ ! -x $VENV_PYTHON || ! -f $VENV/.stamp-build ]]; then
    check_machine "$python"
  fi
  make_venv "$python"
  stamp=$(fingerprint requirements)
  if ! is_stamped "$VENV/.stamp-dev" "$stamp" &&
    { [[ $profile == dev ]] || ! is_stamped "$VENV/.stamp-run" "$stamp"; }; then
    install_requirements "$profile"
    printf '%s\n' "$stamp" >"$VENV/.stamp-$profile"
  fi
  stamp=$(fingerprint pyproject.toml setup.py csrc)
  if ! is_stamped "$VENV/.stamp-build" "$stamp" || [[ ! -e megatron_moetion/$(extension_name) ]]; then
    logged "building csrc/" build_package
    printf '%s\n' "$stamp" >"$VENV/.stamp-build"
  fi
  exec {lock}<&-
  say "ready: $VENV, $("$VENV_PYTHON" -V), megatron-core $(version_of_megatron) ($((SECONDS - started)) s)"
}
