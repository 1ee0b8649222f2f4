#!/usr/bin/env bash
# Runs the replicas of one node under torchrun's launcher, with `dreplica train` or `dreplica burn-in`. All schedulers
# start this script on each node.
# The exit code is the run's: 0 agreed, 2 unusable input, 3 diverged, 4 stopped with a checkpoint, 1 anything else.
# A signal (SIGTERM, SIGINT, SIGHUP, SIGUSR2) to any one node stops all replicas at the same step.
set -euo pipefail
cd "$(dirname "$0")/.."

# Set by the scheduler's script:
: "${NODES:=1}"             # number of nodes
: "${NODE_RANK:=0}"         # rank of this node
: "${HEAD:=127.0.0.1:29500}" # HOST:PORT of node 0, reachable from all nodes
# Set by you:
: "${REPLICAS_PER_NODE:=1}" # replicas on each node
: "${CONFIG:=configs/digits.yaml}"
: "${RUN_NAME:=cluster}"    # a job that is restarted under the same name resumes where it stopped
: "${RUN_ROOT:=runs}"       # on shared storage, so that a restart on another node finds it
: "${SETTINGS:=}"           # further command-line arguments, quoted as in a shell: --optim.lr 0.1 --data.augment '[flip]'
: "${DEVICE:=}"             # world.device. The schedulers' scripts set cuda where the job asked for GPUs
: "${BURN_IN:=}"            # duration of a burn-in, such as 8h, instead of one run
: "${HEAD_SECONDS:=0}"      # time until the name in HEAD is known, where nodes start one after the other
: "${STOP_SECONDS:=120}"    # time to save after a signal to stop; then torchrun kills the workers

if [[ -z "${VIRTUAL_ENV:-}" && -f .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    . .venv/bin/activate
fi
# torchrun's default of 30 s is too short to save a checkpoint of many gigabytes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$STOP_SECONDS}"

case "${NVIDIA_VISIBLE_DEVICES:-}" in # set by Kubernetes for a container with GPUs
GPU-* | MIG-* | [0-9]*) DEVICE="${DEVICE:-cuda}" ;;
esac

until ((SECONDS >= HEAD_SECONDS)) || getent ahosts "${HEAD%:*}" >/dev/null; do
    sleep 1
done

words=$(xargs -r printf '%s\n' <<<"$SETTINGS")
mapfile -t settings < <(printf '%s' "${words:+$words$'\n'}")

case " $SETTINGS" in
*" --world.device"*) ;;
*) [[ -z "$DEVICE" ]] || settings+=(--world.device "$DEVICE") ;;
esac

command=(train)
[[ -z "$BURN_IN" ]] || command=(burn-in --for "$BURN_IN")

# exec: signals reach only the launcher, and only once, and its exit code is this script's.
exec dreplica "${command[@]}" --nodes "$NODES" --node-rank "$NODE_RANK" --head "$HEAD" --replicas "$REPLICAS_PER_NODE" \
    --config "$CONFIG" --run.name "$RUN_NAME" --run.root "$RUN_ROOT" "${settings[@]}"
