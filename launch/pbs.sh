#!/usr/bin/env bash
# PBS job. Submit it from the repository's folder:
#   CONFIG=my.yaml qsub -V -l select=4:ncpus=32:ngpus=8:mpiprocs=1 launch/pbs.sh
#
# PBS sends no signal before the time limit, so this script has a timer. Set WALLTIME_SECONDS to the value of `-l
# walltime`. STOP_SECONDS plus one minute before the limit, all replicas stop at the same step and write a checkpoint
# (exit code 4). The script then submits the job again under the same run name with the same resources, and the run
# resumes from the checkpoint.
#PBS -N dreplica
#PBS -l select=2:ncpus=8:mpiprocs=1
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -r y
#PBS -j oe
set -euo pipefail
cd "$PBS_O_WORKDIR"

mapfile -t hosts < <(awk '!seen[$0]++' "$PBS_NODEFILE")
export REPLICAS_PER_NODE="${REPLICAS_PER_NODE:-1}"
export CONFIG="${CONFIG:-configs/digits.yaml}"
export RUN_NAME="${RUN_NAME:-$PBS_JOBNAME-${PBS_JOBID%%.*}}" # unchanged when PBS reruns the job
export RUN_ROOT="${RUN_ROOT:-runs}"
export SETTINGS="${SETTINGS:-}"
export STOP_SECONDS="${STOP_SECONDS:-120}"
export WALLTIME_SECONDS="${WALLTIME_SECONDS:-86400}"

export HEAD="${HEAD:-${hosts[0]}:$((20000 + 10#${PBS_JOBID//[!0-9]/} % 10000))}"

on_node() {
    pbsdsh -n "$1" -- bash -c "$2"
}

. launch/hosts.bash
timer() {
    local sleeper
    sleep "$1" &
    sleeper=$!
    trap 'kill "$sleeper"; exit' TERM
    wait "$sleeper"
    kill -USR2 $$
}
time_left=$((WALLTIME_SECONDS - STOP_SECONDS - 60))
timer "$((time_left > 0 ? time_left : 0))" &
timer=$!
trap 'kill "$timer" 2>/dev/null || true' EXIT
code=0
run_everywhere || code=$?
# Not after SIGTERM from qdel, since the user has cancelled that job. A burn-in cannot be resumed.
if [[ "$code" == 4 && "$stop_signal" == USR2 && -z "${BURN_IN:-}" ]]; then
    # Options from qsub's command line are not in this script, so they are read from qstat, which folds long lines.
    attributes=$(qstat -f "$PBS_JOBID" | sed -e ':a' -e 'N' -e '$!ba' -e 's/\n\t//g' || true)
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
    env -u HEAD qsub -V "${options[@]}" launch/pbs.sh # the next job may run on other nodes
fi
exit "$code"
