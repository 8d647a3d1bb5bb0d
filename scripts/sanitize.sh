#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the part of csrc/ that needs no GPU with GCC's sanitizers, and runs it.
#
#   scripts/sanitize.sh            address, then thread
#   scripts/sanitize.sh address    out of bounds, use after free, leaks, undefined behaviour: tests/native/, which calls
#                                  the pools from many threads, and the tests of units that reach csrc/ from Python
#   scripts/sanitize.sh thread     data races: tests/native/ alone, since neither Python nor torch is built for it
#   scripts/sanitize.sh planted    each of them finds a fault that is put into a copy of csrc/
#
# All is built in copies below build/sanitize/. Ends with an error, after the report, where something is found. No
# suppressions are needed: of Python and torch only calls into csrc/ are seen, and their leaks are not looked for, since
# an interpreter keeps what it has until its process ends.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"

# What reaches csrc/: through NumPy arrays whose ends the sanitizer knows. Gibibytes, and tables of ten thousand rows,
# take minutes and show nothing more.
TESTS=(
  tests/unit/snapshot tests/unit/replicate/test_pipeline.py tests/unit/recover/test_restore.py
  tests/unit/recover/test_rollforward.py tests/unit/recover/test_session_device.py
)
LEFT_OUT='not gibibyte and not ten_thousand'
FLAGS='-O1 -g -fno-omit-frame-pointer'
declare -A SANITIZE=(
  [address]='-fsanitize=address,undefined -fno-sanitize-recover=all'
  [thread]='-fsanitize=thread'
)

# A sanitizer, a file of csrc/, what stands there, and the fault that takes its place.
PLANTED=(
  address host/pack.cpp
  'std::memcpy(&word, bytes + at, static_cast<size_t>(std::min(kWordBytes, nbytes - at)));'
  'std::memcpy(&word, bytes + at, static_cast<size_t>(kWordBytes));'

  address host/kernels.cpp
  'std::memcpy(&word, lines.src + i * kWordBytes, kWordBytes);'
  'word = *reinterpret_cast<const uint64_t*>(lines.src + i * kWordBytes);'

  address host/thread_pool.cpp
  'state_->stop_and_join();'
  'state_.release()->stop_and_join();'

  thread host/pack.cpp
  '__atomic_fetch_add(&digests[row], sum.value(), __ATOMIC_RELAXED);'
  'digests[row] += sum.value();'

  thread host/thread_pool.cpp
  'state.done.wait(lock, [&] { return state.active == 0; });'
  ''

  thread cuda/device_pool.cpp
  'std::lock_guard<std::mutex> lock(mutex_);'
  ''
)

# The options of all sanitizers; what they find is in files named "report" in this folder, or in the output.
with_reports() {
  local folder=$1 options
  shift
  options="exitcode=99:log_path=$folder/report:print_stacktrace=1"
  env ASAN_OPTIONS="$options:${ASAN_MORE:-}" UBSAN_OPTIONS="$options" TSAN_OPTIONS="$options:halt_on_error=1" "$@"
}

# The sanitizers' libraries: they have to come first in a program that is not built with them.
libraries() {
  local name path found=()
  for name in libasan.so libubsan.so libstdc++.so.6; do
    path=$($CXX -print-file-name="$name")
    [[ $path == /* ]] || die "$CXX has no $name: the sanitizers of GCC are needed (CXX=g++)"
    found+=("$path")
  done
  printf '%s' "${found[*]}"
}

build_native() {
  local folder=$1 sanitizer=$2
  # shellcheck disable=SC2086 # flags
  $CXX -std=c++17 $FLAGS ${SANITIZE[$sanitizer]} -pthread -Wall -Wextra -Werror -I"$folder/csrc" \
    "$ROOT/tests/native/many_threads.cpp" "$folder"/csrc/host/*.cpp "$folder"/csrc/cuda/*.cpp -o "$folder/many_threads"
}

# An empty folder with a copy of csrc/.
copy_of_csrc() {
  local folder=$1
  rm -rf -- "$folder"
  mkdir -p -- "$folder"
  cp -r -- "$ROOT/csrc" "$folder/csrc"
}

found() {
  local folder=$1 what=$2
  cat -- "$folder"/report* "$folder/native.log" 2>/dev/null >&2 || true
  [[ ! -f $folder/tests.log ]] || tail -n 40 -- "$folder/tests.log" >&2
  die "$what; the report is above"
}

run_native() {
  local folder=$ROOT/build/sanitize/$1 sanitizer=$1
  copy_of_csrc "$folder"
  logged "$sanitizer: building tests/native" build_native "$folder" "$sanitizer"
  say "$sanitizer: running tests/native ..."
  with_reports "$folder" "$folder/many_threads" >"$folder/native.log" 2>&1 || found "$folder" "tests/native fails"
}

run_tests() {
  local folder=$ROOT/build/sanitize/address started=$SECONDS preload
  cp -r -- "$ROOT"/{megatron_moetion,tests,scripts,pyproject.toml,setup.py,README.md} "$folder"
  rm -f -- "$folder"/megatron_moetion/_C.*.so
  cd -- "$folder"
  preload=$(libraries)
  # The compiler and the linker of setup.py, and no CUDA.
  CXX="$CXX ${SANITIZE[address]}" CXXFLAGS=$FLAGS MOETION_CUDA=0 \
    logged 'address: building the module' "$VENV_PYTHON" setup.py build_ext --inplace
  say "address: running the tests ..."
  # PYTHONMALLOC: small objects have ends that are known too. The capture leaves the output of csrc/ alone.
  ASAN_MORE=detect_leaks=0 with_reports "$folder" LD_PRELOAD="$preload" PYTHONPATH="$folder" PYTHONMALLOC=malloc \
    "$VENV_PYTHON" -m pytest -v --capture=sys -p no:cacheprovider -k "$LEFT_OUT" "${TESTS[@]}" >"$folder/tests.log" 2>&1 ||
    found "$folder" 'tests fail with the sanitizer'
  cd -- "$ROOT"
  say "address: $(tail -n 1 -- "$folder/tests.log") ($((SECONDS - started)) s)"
}

# Replaces a text in a file, everywhere.
plant() {
  local file=$1 old=$2 new=$3 text
  text=$(<"$file")
  [[ $text == *"$old"* ]] || die "$file has no '$old': mend PLANTED"
  printf '%s\n' "${text//"$old"/"$new"}" >"$file"
}

run_planted() {
  local folder=$ROOT/build/sanitize/planted number line
  for ((number = 0; number < ${#PLANTED[@]}; number += 4)); do
    local sanitizer=${PLANTED[number]} file=${PLANTED[number + 1]} rc=0
    copy_of_csrc "$folder"
    plant "$folder/csrc/$file" "${PLANTED[number + 2]}" "${PLANTED[number + 3]}"
    logged "building with a fault in $file" build_native "$folder" "$sanitizer"
    with_reports "$folder" timeout 300 "$folder/many_threads" >"$folder/native.log" 2>&1 || rc=$?
    line=$(grep -h -m 1 -e ERROR -e WARNING -e 'runtime error' "$folder"/report* "$folder/native.log" 2>/dev/null) ||
      [[ -n $line ]] ||
      die "the sanitizer ($sanitizer) misses the fault in $file: exit code $rc"
    say "found: ${line%%$'\n'*}"
  done
}

set_up dev
CXX=${CXX:-g++}
(($#)) || set -- address thread
for leg in "$@"; do
  case $leg in
    address)
      run_native address
      run_tests
      ;;
    thread) run_native thread ;;
    planted) run_planted ;;
    *) die "there is no '$leg': address, thread or planted" ;;
  esac
done
say "clean ($SECONDS s)"
