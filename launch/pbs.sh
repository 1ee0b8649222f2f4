#!/usr/bin/env bash
# PBS, from the repository's folder: CONFIG=my.yaml qsub -V -l select=4:ncpus=32:ngpus=8:mpiprocs=1 launch/pbs.sh
#
# PBS gives no signal ahead of the time limit, so this script keeps the time itself: WALLTIME_SECONDS is what `-l
# walltime` says. STOP_SECONDS and a minute before it, the replicas stop at the same step and write a checkpoint (exit
# code 4), and the job is submitted again under the same run name, with the same resources, to go on from there.
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
export RUN_NAME="${RUN_NAME:-$PBS_JOBNAME-${PBS_JOBID%%.*}}" # the same after PBS has run the job again
export RUN_ROOT="${RUN_ROOT:-runs}"
export SETTINGS="${SETTINGS:-}"
export STOP_SECONDS="${STOP_SECONDS:-120}"
export WALLTIME_SECONDS="${WALLTIME_SECONDS:-86400}"

export HEAD="${HEAD:-${hosts[0]}:$((20000 + 10#${PBS_JOBID//[!0-9]/} % 10000))}"

on_node() {
    pbsdsh -n "$1" -- bash -c "$2"
}

. launch/hosts.bash
clock() {
    local nap
    sleep "$1" &
    nap=$!
    trap 'kill "$nap"; exit' TERM
    wait "$nap"
    kill -USR2 $$
}
time_left=$((WALLTIME_SECONDS - STOP_SECONDS - 60))
clock "$((time_left > 0 ? time_left : 0))" &
clock=$!
trap 'kill "$clock" 2>/dev/null || true' EXIT
code=0
run_everywhere || code=$?
# Not where qdel sent SIGTERM: that job is not wanted any more. A burn-in has nothing to go on with.
if [[ "$code" == 4 && "$told" == USR2 && -z "${BURN_IN:-}" ]]; then
    # What this job was asked for on qsub's command line does not stand in this script. qstat folds long lines.
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
    env -u HEAD qsub -V "${options[@]}" launch/pbs.sh # it will run on other machines
fi
exit "$code"
