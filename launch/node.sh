#!/usr/bin/env bash
# What every machine of a job runs, whatever started it: its replicas, under torchrun's launcher (`dreplica train`, or
# `dreplica burn-in`).
# Its exit code is the run's: 0 agreed, 2 unusable input, 3 diverged, 4 stopped with a checkpoint, 1 anything else.
# A signal (SIGTERM, SIGINT, SIGHUP, SIGUSR2) to any one machine stops all replicas at the same step.
set -euo pipefail
cd "$(dirname "$0")/.."

# Set by whatever starts this:
: "${NODES:=1}"             # how many machines
: "${NODE_RANK:=0}"         # which of them this is
: "${HEAD:=127.0.0.1:29500}" # HOST:PORT of machine 0, which all machines reach
# Set by you:
: "${REPLICAS_PER_NODE:=1}" # replicas on each machine
: "${CONFIG:=configs/digits.yaml}"
: "${RUN_NAME:=cluster}"    # a job that is started again under the same name goes on where it was stopped
: "${RUN_ROOT:=runs}"       # on storage that outlives the machine, and that a restart on another machine sees
: "${SETTINGS:=}"           # more of the command line, quoted as in a shell: --optim.lr 0.1 --data.augment '[flip]'
: "${BURN_IN:=}"            # how long to burn cards in, such as 8h, in place of one run
: "${STOP_SECONDS:=120}"    # for saving, once told to stop; torchrun kills workers after that

if [[ -z "${VIRTUAL_ENV:-}" && -f .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    . .venv/bin/activate
fi
# torchrun's default is 30 s, too little for a checkpoint of many gigabytes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$STOP_SECONDS}"

words=$(xargs -r printf '%s\n' <<<"$SETTINGS")
mapfile -t settings < <(printf '%s' "${words:+$words$'\n'}")

command=(train)
[[ -z "$BURN_IN" ]] || command=(burn-in --for "$BURN_IN")

# exec: so that a signal meets the launcher alone, once, and its exit code is this script's.
exec dreplica "${command[@]}" --nodes "$NODES" --node-rank "$NODE_RANK" --head "$HEAD" --replicas "$REPLICAS_PER_NODE" \
    --config "$CONFIG" --run.name "$RUN_NAME" --run.root "$RUN_ROOT" "${settings[@]}"
