# Sourced by ssh.sh and pbs.sh: starts launch/node.sh on each of the machines `hosts`, passes signals on, and waits.
# `on_node RANK COMMAND` runs a shell command on machine RANK and ends with its exit code.
# shellcheck shell=bash

# shellcheck disable=SC2154
num_hosts=${#hosts[@]}
pid_file="/tmp/dreplica-${RUN_NAME//\//_}-$$" # of the launcher, on each machine
# shellcheck disable=SC2034
told= # the signal that asked to stop

node_command() {
    local name
    printf 'cd %q && echo $$ >%q &&' "$PWD" "$pid_file-$1"
    for name in NODES HEAD REPLICAS_PER_NODE CONFIG RUN_NAME RUN_ROOT SETTINGS BURN_IN STOP_SECONDS PATH VIRTUAL_ENV \
        PYTHONPATH GLOO_SOCKET_IFNAME; do
        [[ -z "${!name:-}" ]] || printf ' %s=%q' "$name" "${!name}"
    done
    printf ' NODE_RANK=%q exec bash launch/node.sh' "$1"
}

stop_all() {
    local rank
    # shellcheck disable=SC2034
    told=$1
    for ((rank = 0; rank < num_hosts; rank++)); do
        # In the background: a machine that does not answer keeps the others from nothing. One that hears is enough.
        on_node "$rank" "kill -TERM \$(cat $(printf %q "$pid_file-$rank"))" </dev/null &
    done
}

# Ends with the highest exit code of all machines, as Slurm's srun does.
run_everywhere() {
    local rank code highest=0
    local -a runs=()
    export NODES=$num_hosts
    for ((rank = 0; rank < num_hosts; rank++)); do
        # Ctrl-C does not reach what runs in the background of a script: each machine is asked to stop, and tells how.
        on_node "$rank" "$(node_command "$rank")" </dev/null &
        runs+=("$!")
    done
    for rank in TERM INT HUP USR2; do
        # shellcheck disable=SC2064
        trap "stop_all $rank" "$rank"
    done
    for rank in "${!runs[@]}"; do
        while kill -0 "${runs[rank]}" 2>/dev/null; do
            wait "${runs[rank]}" || true # a signal that is trapped cuts it short
        done
        code=0
        wait "${runs[rank]}" || code=$?
        ((code <= highest)) || highest=$code
        on_node "$rank" "rm -f $(printf %q "$pid_file-$rank")" </dev/null || true
    done
    return "$highest"
}
