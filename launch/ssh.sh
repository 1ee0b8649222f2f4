#!/usr/bin/env bash
# Nodes reachable with ssh, without a batch system: HOSTS="node0 node1" CONFIG=my.yaml launch/ssh.sh
#
# The repository is installed in the same folder on each node. Ctrl-C or SIGTERM stops all replicas at the same step with
# a checkpoint (exit code 4). The same command resumes from the checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra hosts <<<"${HOSTS:?list the nodes, node 0 first: HOSTS='node0 node1'}"
export REPLICAS_PER_NODE="${REPLICAS_PER_NODE:-1}"
export CONFIG="${CONFIG:-configs/digits.yaml}"
export RUN_NAME="${RUN_NAME:-cluster}"
export RUN_ROOT="${RUN_ROOT:-runs}"
export SETTINGS="${SETTINGS:-}"
export DEVICE="${DEVICE:-}"
export STOP_SECONDS="${STOP_SECONDS:-120}"

first=${hosts[0]##*@}
export HEAD="${HEAD:-$first:29500}"

on_node() {
    exec ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[$1]}" "bash -c $(printf %q "$2")"
}

run_node() {
    on_node "$@"
}

. launch/hosts.bash
run_everywhere
