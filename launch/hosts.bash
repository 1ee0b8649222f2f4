# Sourced by ssh.sh and pbs.sh: starts launch/node.sh on each node in `hosts`, forwards signals and waits.
# The sourcing script defines `on_node RANK COMMAND`, which becomes a shell command on node RANK, and `run_node RANK
# COMMAND`, which also returns its exit code. Both are called in the background.
# shellcheck shell=bash

# shellcheck disable=SC2154
num_hosts=${#hosts[@]}
pid_file="/tmp/dreplica-${RUN_NAME//\//_}-$$" # process id of the launcher, on each node
# shellcheck disable=SC2034
stop_signal= # the signal received, if any

node_command() {
    local name
    printf 'cd %q && echo $$ >%q &&' "$PWD" "$pid_file-$1"
    for name in NODES HEAD REPLICAS_PER_NODE CONFIG RUN_NAME RUN_ROOT SETTINGS DEVICE BURN_IN STOP_SECONDS PATH \
        VIRTUAL_ENV PYTHONPATH GLOO_SOCKET_IFNAME; do
        [[ -z "${!name:-}" ]] || printf ' %s=%q' "$name" "${!name}"
    done
    printf ' NODE_RANK=%q exec bash launch/node.sh' "$1"
}

stop_all() {
    local rank
    # shellcheck disable=SC2034
    stop_signal=$1
    for ((rank = 0; rank < num_hosts; rank++)); do
        # In the background, so that a node that does not respond delays no other. One node that receives it is enough.
        on_node "$rank" "kill -TERM \$(cat $(printf %q "$pid_file-$rank"))" </dev/null &
    done
}

# Returns the highest exit code of all nodes, as Slurm's srun does.
run_everywhere() {
    local rank code highest=0
    local -a runs=() cleanups=()
    export NODES=$num_hosts
    for ((rank = 0; rank < num_hosts; rank++)); do
        # Ctrl-C does not reach background processes of a script, so stop_all signals each node.
        run_node "$rank" "$(node_command "$rank")" </dev/null &
        runs+=("$!")
    done
    for rank in TERM INT HUP USR2; do
        # shellcheck disable=SC2064
        trap "stop_all $rank" "$rank"
    done
    for rank in "${!runs[@]}"; do
        while kill -0 "${runs[rank]}" 2>/dev/null; do
            wait "${runs[rank]}" || true # a trapped signal interrupts `wait`
        done
        code=0
        wait "${runs[rank]}" || code=$?
        ((code <= highest)) || highest=$code
        on_node "$rank" "rm -f $(printf %q "$pid_file-$rank")" </dev/null &
        cleanups+=("$!")
    done
    for ((rank = 0; rank < 50; rank++)); do
        kill -0 "${cleanups[@]}" 2>/dev/null || break # as long as one runs
        sleep 0.1 || true
    done
    kill "${cleanups[@]}" 2>/dev/null || true # a node that is down may never answer
    return "$highest"
}
