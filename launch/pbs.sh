#!/usr/bin/env bash
# PBS job. Submit it from the repository's folder:
#   CONFIG=my.yaml qsub -V -l select=4:ncpus=32:ngpus=8:mpiprocs=8 launch/pbs.sh
#
# PBS sends no signal before the time limit, so this script has a timer. STOP_SECONDS plus one minute before the limit
# of the job (from `qstat -f`), all replicas stop at the same step and write a checkpoint (exit code 4). The script then
# submits the job again under the same run name with the same resources, and the run resumes from the checkpoint.
#PBS -N dreplica
#PBS -l select=2:ncpus=8:mpiprocs=1
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -r y
#PBS -j oe
set -euo pipefail
cd "$PBS_O_WORKDIR"

# PBS repeats a host for each of its `mpiprocs`. pbsdsh counts the lines, so a node has the number of its first line.
mapfile -t hosts < <(awk '!seen[$0]++' "$PBS_NODEFILE")
mapfile -t lines < <(awk '!seen[$0]++ {print NR - 1}' "$PBS_NODEFILE")
mapfile -t processes < <(sort "$PBS_NODEFILE" | uniq -c | awk '{print $1}' | sort -u)
if [[ -z "${REPLICAS_PER_NODE:-}" && ${#processes[@]} != 1 ]]; then
    echo "error: the nodes have different numbers of mpiprocs (${processes[*]}). Set REPLICAS_PER_NODE." >&2
    exit 2
fi
export REPLICAS_PER_NODE="${REPLICAS_PER_NODE:-${processes[0]}}"
export CONFIG="${CONFIG:-configs/digits.yaml}"
export RUN_NAME="${RUN_NAME:-$PBS_JOBNAME-${PBS_JOBID%%.*}}" # unchanged when PBS reruns the job
export RUN_ROOT="${RUN_ROOT:-runs}"
export SETTINGS="${SETTINGS:-}"
export STOP_SECONDS="${STOP_SECONDS:-120}"
export REQUEUES="${REQUEUES:-0}" # how often this run was submitted again
: "${MAX_REQUEUES:=100}"
: "${EXIT_CODE_SECONDS:=30}" # within which a file that another node has written is visible here
export HEAD="${HEAD:-${hosts[0]}:$((20000 + 10#${PBS_JOBID//[!0-9]/} % 10000))}"

# What was asked for, options from qsub's command line included. qstat folds long lines.
attributes=$(qstat -f "$PBS_JOBID" | sed -e ':a' -e 'N' -e '$!ba' -e 's/\n\t//g' || true)
attribute() {
    sed -n "s/^ *$1 = //p" <<<"$attributes"
}

chunks=$(attribute 'Resource_List\.select')
if [[ "$chunks" =~ ngpus=[1-9] || "$(attribute 'Resource_List\.ngpus')" =~ ^[1-9] ]]; then
    export DEVICE="${DEVICE:-cuda}" # never on CPUs while GPUs wait
fi
export DEVICE="${DEVICE:-}"

# pbsdsh always returns 0, so each node writes its exit code into this folder, which all nodes share.
mkdir -p "$RUN_ROOT"
codes=$(cd "$RUN_ROOT" && mktemp -d "$PWD/.exit-codes-XXXXXX")
trap 'rm -rf "$codes"' EXIT

on_node() {
    exec pbsdsh -n "${lines[$1]}" -- bash -c "$2"
}

run_node() {
    local file="$codes/$1" process first_end="" patience=$EXIT_CODE_SECONDS
    trap : TERM INT HUP USR2 # qdel signals all processes of the job: wait until the run has saved
    # The shell outlives a signal to the whole job, to write the code of the launcher, which saves a checkpoint first.
    on_node "$1" "trap : TERM INT HUP USR2
        bash -c $(printf %q "$2") &
        while kill -0 \$! 2>/dev/null; do wait \$!; done
        wait \$!
        echo \$? >$(printf %q "$file.part") && mv $(printf '%q %q' "$file.part" "$file")" &
    process=$!
    while kill -0 "$process" 2>/dev/null; do
        sleep 0.5 || true
        # All nodes end together. pbsdsh may wait forever for one that is down.
        [[ -n "$first_end" ]] || ! compgen -G "$codes/*[0-9]" >/dev/null || first_end=$SECONDS
        if [[ -n "$first_end" ]] && ((SECONDS - first_end > STOP_SECONDS + 60)); then
            kill "$process" 2>/dev/null || true
            patience=-1
            break
        fi
    done
    # Killed by qdel, pbsdsh says nothing of the node.
    wait "$process" || ((patience < 0)) || patience=$((patience + STOP_SECONDS))
    while [[ ! -s "$file" ]] && ((patience-- > 0)); do # a shared folder may show the file late
        sleep 1 || true
    done
    [[ ! -s "$file" ]] || return "$(<"$file")"
    echo "error: node $1 (${hosts[$1]}) has left no exit code in $codes: it is down, or its processes were killed." >&2
    return 1
}

# Prints the seconds until the time limit, or nothing without a limit.
seconds_left() {
    local limit used
    limit=${WALLTIME_SECONDS:-$(attribute 'Resource_List\.walltime')}
    used=$(attribute 'resources_used\.walltime')
    [[ -z "$limit" ]] || echo $(($(to_seconds "$limit") - $(to_seconds "${used:-0}")))
}

# Converts [[HH:]MM:]SS to seconds.
to_seconds() {
    local part seconds=0
    for part in ${1//:/ }; do
        seconds=$((60 * seconds + 10#${part%%.*}))
    done
    echo "$seconds"
}

timer() {
    local sleeper
    sleep "$1" &
    sleeper=$!
    trap 'kill "$sleeper"; exit' TERM
    wait "$sleeper"
    kill -USR2 $$
}

left=$(seconds_left)
timer=
if [[ -z "$left" ]]; then
    echo "no time limit is known from 'qstat -f $PBS_JOBID', so no checkpoint is written before it: set WALLTIME_SECONDS"
elif ((left <= STOP_SECONDS + 60)); then
    echo "error: $left s are left until the time limit, and STOP_SECONDS plus one minute are $((STOP_SECONDS + 60)) s." \
        "Ask for a longer walltime." >&2
    exit 2
fi

. launch/hosts.bash
if [[ -n "$left" ]]; then
    timer $((left - STOP_SECONDS - 60)) &
    timer=$!
fi
trap '[[ -z "$timer" ]] || kill "$timer" 2>/dev/null || true; rm -rf "$codes"' EXIT
code=0
run_everywhere || code=$?
# Not after SIGTERM from qdel, since the user has cancelled that job. A burn-in cannot be resumed.
if [[ "$code" == 4 && "$stop_signal" == USR2 && -z "${BURN_IN:-}" ]]; then
    if ((REQUEUES >= MAX_REQUEUES)); then
        echo "stopped with a checkpoint: not submitted again, after $REQUEUES times (MAX_REQUEUES)"
        exit "$code"
    fi
    options=()
    while read -r name value; do
        case "$name" in
        Job_Name) options+=(-N "$value") ;;
        queue) options+=(-q "$value") ;;
        Account_Name) options+=(-A "$value") ;;
        Resource_List.select | Resource_List.place | Resource_List.walltime)
            options+=(-l "${name#Resource_List.}=$value")
            ;;
        esac
    done < <(sed -n 's/^ *\([A-Za-z_.]*\) = /\1 /p' <<<"$attributes")
    echo "stopped with a checkpoint: submitted again"
    # The next job may run on other nodes.
    env -u HEAD REQUEUES=$((REQUEUES + 1)) qsub -V "${options[@]}" launch/pbs.sh
fi
exit "$code"
