#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One node's part of pretrain_gpt_moe.sbatch: run the agent, or stand by until another node's agent is lost.
#
#   node.sh FOLDER NODES COMMAND...
#
# The first NODES tasks of the step run COMMAND, the others are spares. FOLDER is shared by all nodes and holds
#   beat-NODE    touched every few seconds while NODE's agent lives
#   code-NODE    exit code of NODE's agent
#   taken-NODE/  a spare has taken NODE's place
#
# Why a spare's agent is not simply started with the others: torchrun would let it wait, and at the next restart of
# any process take it in for a node that lives. That node then waits in turn, and agents that see one waiting restart:
# the ranks are started every second and never train (seen with torch 2.13).
set -euo pipefail
shopt -s nullglob

folder=$1 nodes=$2
shift 2
me=${SLURMD_NODENAME:-$(hostname)}
BEAT_S=${BEAT_S:-5}
LOST_BEATS=12 # without a sign of life: by counts and not by clocks, so that a file system that hangs loses no node

say() { printf '[slurm] %s: %s\n' "$me" "$*"; }

# Returns when this node has taken a lost one's place. Ends the task when the others are done.
stand_by() {
  local file node now
  local -A last=() unchanged=()
  say "standing by"
  while true; do
    for file in "$folder"/code-*; do
      if (($(<"$file") < 128)); then # the agent gave up or is done, and so do all
        say "not needed"
        exit 0
      fi
      take "${file##*/code-}" && return # the node lives, but its agent was killed
    done
    for file in "$folder"/beat-*; do
      node=${file##*/beat-}
      : <"$file" || continue # opened, so that a network file system looks again
      now=$(stat --format=%y -- "$file") || continue
      if [[ ${last[$node]:-} != "$now" ]]; then
        last[$node]=$now
        unchanged[$node]=0
      elif ((++unchanged[$node] >= LOST_BEATS)); then
        take "$node" && return
      fi
    done
    sleep "$BEAT_S"
  done
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
    sleep "$BEAT_S"
  done
}

if ((SLURM_PROCID >= nodes)); then
  stand_by
fi
touch -- "$folder/beat-$me"
"$@" &
agent=$!
beat "$agent" >/dev/null 2>&1 &
code=0
wait "$agent" || code=$?
if [[ ! -d $folder/taken-$me ]]; then
  echo "$code" >"$folder/.code-$me"
  mv -- "$folder/.code-$me" "$folder/code-$me" # read by others: whole or not at all
fi
exit "$code"
