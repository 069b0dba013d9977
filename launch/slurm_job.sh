#!/usr/bin/env bash
#
# The job that launch/slurm.sh submits: slurm_job.sh MAX_RESTARTS PROGRAM ARGUMENTS
#
# Runs the program once for each GPU, and puts the job back into the queue where it ends with 75,
# which means that it was stopped and has saved its state.
set -euo pipefail

STOPPED=75
max_restarts=$1
shift
restarts=${SLURM_RESTART_COUNT:-0}

say() {
    printf '%s job %s: %s\n' "$(date '+%F %T')" "$SLURM_JOB_ID" "$*"
}

# Preemption can send SIGTERM here too; the run is to end first.
trap : TERM

# All GPUs of a node are visible to each of its processes: jax.distributed picks one by the local
# number. No --kill-on-bad-exit: the first process to end would take the others' checkpoint with it.
code=0
export PYTHONUNBUFFERED=1
srun --label --gpu-bind=none "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "$@" || code=$?
if ((code != STOPPED)); then
    say "ended with exit code $code."
elif ((restarts >= max_restarts)); then
    say "stopped, and no restarts are left of $max_restarts."
else
    say "stopped, and has saved its state; back into the queue after $restarts restarts."
    scontrol requeue "$SLURM_JOB_ID" || say "cannot be put back; submit the same command again."
fi
exit "$code"
