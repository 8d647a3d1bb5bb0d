#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One node's part of pretrain_gpt_moe.sbatch: run the agent, or stand by until another node's agent is lost.
#
#   node.sh FOLDER NODES WARM M N PYTHON... LAUNCHER... PROGRAM...
#
# The first NODES tasks of the step run PYTHON LAUNCHER PROGRAM, the first two being M and N words; the others are
# spares. Where WARM is not 0, a spare runs PYTHON PROGRAM meanwhile, which imports everything and takes a lost node's
# place at once (docs/operations.md, "Warm restarts"). FOLDER is shared by all nodes and holds
#   beat-NODE    touched every few seconds while NODE's agent lives
#   code-NODE    exit code of NODE's agent
#   taken-NODE/  a spare has taken NODE's place
#   note-NODE    whose place the warm ranks of the spare NODE have taken
#   finished     these ranks have done all their work, and so have all others
#
# Why a spare's agent is not simply started with the others: torchrun would let it wait, and at the next restart of
# any process take it in for a node that lives. That node then waits in turn, and agents that see one waiting restart:
# the ranks are started every second and never train (seen with torch 2.13).
set -euo pipefail
shopt -s nullglob

folder=$1 nodes=$2 warm=$3
python=("${@:6:$4}") launcher=("${@:6+$4:$5}") program=("${@:6+$4+$5}")
me=${SLURMD_NODENAME:-$(hostname)}
BEAT_S=${BEAT_S:-5}
LOST_BEATS=12 # without a sign of life: by counts and not by clocks, so that a file system that hangs loses no node
WARM_BEATS=12 # more, in which warm ranks may take the place of a node that is lost
WARM_STARTS=5 # of a spare's process
standby='' starts=0
declare -A suspect=() # beats since a node was found lost
note=$folder/note-$me

say() { printf '[slurm] %s: %s\n' "$me" "$*"; }

# Returns when this node has taken a lost one's place. Ends the task when the others are done.
stand_by() {
  local file node now
  local -A last=() unchanged=()
  say "standing by"
  while true; do
    stand_by_warm && return
    for file in "$folder"/code-*; do
      if (($(<"$file") < 128)); then # the agent gave up or is done, and so do all
        say "not needed"
        [[ -z $standby ]] || kill -TERM "$standby" || true
        exit 0
      fi
      lost "${file##*/code-}" && return # the node lives, but its agent was killed
    done
    for file in "$folder"/beat-*; do
      node=${file##*/beat-}
      : <"$file" || continue # opened, so that a network file system looks again
      now=$(stat --format=%y -- "$file") || continue
      if [[ ${last[$node]:-} != "$now" ]]; then
        last[$node]=$now
        unchanged[$node]=0
        unset "suspect[$node]"
      elif ((++unchanged[$node] >= LOST_BEATS)); then
        lost "$node" && return
      fi
    done
    sleep "$BEAT_S"
  done
}

# Keeps the spare's process going. Returns when its ranks had taken a place and left the rest to the launcher.
stand_by_warm() {
  local code=0
  ((warm)) || return 1
  if [[ -n $standby && -s $note ]]; then
    if ! take "$(<"$note")"; then # another spare was first: two would be one too many for ever
      kill -KILL "$standby" 2>/dev/null || true
      rm -f -- "$note"
      standby=''
      return 1
    fi
    serve "$standby" || code=$?
    ((code)) || touch -- "$folder/finished"
    ((code)) || answer 0
    ((code)) || exit 0
    standby=''
    return 0
  fi
  if [[ -n $standby ]] && ! kill -0 "$standby" 2>/dev/null; then
    wait "$standby" || code=$?
    say "the process that stands by has ended with exit code $code"
    standby=''
  fi
  if [[ -z $standby ]] && ((starts++ < WARM_STARTS)); then
    (trap '' USR1 && MOETION_STANDBY=$note exec "${python[@]}" "${program[@]}") &
    standby=$!
  fi
  return 1
}

# Whether this spare's agent is to run in place of that node. Warm ranks come first, for some time.
lost() {
  [[ ! -d $folder/taken-$1 ]] || return 1
  if [[ -n $standby ]]; then
    if [[ -z ${suspect[$1]:-} ]] && ! claimed "$1"; then # once: all ranks start again
      kill -USR1 "$standby" 2>/dev/null || true
    fi
    suspect[$1]=$((${suspect[$1]:-0} + 1))
    ((suspect[$1] > WARM_BEATS)) || return 1
    [[ ! -s $note ]] || return 1 # its ranks have just taken a place
  fi
  take "$1" || return 1
  if [[ -n $standby ]]; then
    kill -KILL "$standby" 2>/dev/null || true
    standby=''
  fi
}

# Whether some spare's warm ranks have taken that node's place already.
claimed() {
  local claim
  for claim in "$folder"/note-*; do
    [[ $(<"$claim") != "$1" ]] || return 0
  done
  return 1
}

# One spare for each lost node: only one can make the folder.
take() {
  mkdir -- "$folder/taken-$1" 2>/dev/null || return
  say "taking the place of $1"
}

# Signs of life, as long as the agent lives. A node whose place was taken must not come back.
beat() {
  while kill -0 "$1" 2>/dev/null; do
    touch -- "$folder/beat-$me" || true
    if [[ -d $folder/taken-$me ]]; then
      kill -TERM "$1" || true
    fi
    # A lost node's agent is not there when the others' wait for each other at the end, five minutes long and deaf to
    # SIGTERM.
    if [[ -f $folder/finished ]]; then
      sleep "$BEAT_S"
      kill -TERM "$1" || true
      sleep "$BEAT_S"
      kill -KILL "$1" || true
    fi
    sleep "$BEAT_S"
  done
}

# Run with signs of life until it ends; its exit code.
serve() {
  local code=0
  touch -- "$folder/beat-$me"
  beat "$1" >/dev/null 2>&1 &
  wait "$1" || code=$?
  [[ ! -f $folder/finished ]] || code=0
  return "$code"
}

# This node's exit code, for all others.
answer() {
  [[ ! -d $folder/taken-$me ]] || return 0
  echo "$1" >"$folder/.code-$me"
  mv -- "$folder/.code-$me" "$folder/code-$me" # read by others: whole or not at all
}

if ((SLURM_PROCID >= nodes)); then
  stand_by
fi
"${python[@]}" "${launcher[@]}" "${program[@]}" &
code=0
serve "$!" || code=$?
answer "$code"
exit "$code"
