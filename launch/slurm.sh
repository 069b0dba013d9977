#!/usr/bin/env bash
#
# Submits a command of vqgan_jax as a SLURM job on GPUs that goes on until it is done.
#
#   launch/slurm.sh OPTIONS -- vqgan_jax.NAME FLAGS
#   launch/slurm.sh --name=f16 --nodes=2 --gpus_per_node=8 --time=24:00:00 --partition=gpu \
#       -- vqgan_jax.train --config=configs/vqgan_f16.py --workdir=/shared/runs/f16
#
# The job is put back into the queue where its time is up, where it is preempted and where a node
# fails, and goes on from the last checkpoint. It runs in the current directory, with the Python of
# the current environment; both must be on a file system that all nodes share.
#
#   --name=NAME            of the job
#   --nodes=N              1 by default
#   --gpus_per_node=N      1 by default; there is one process for each GPU, as jax.distributed
#                          expects under SLURM: the process with local number i takes GPU i
#   --cpus_per_gpu=N       8 by default, most of them for reading images
#   --time=TIME            after which the job is put back, such as 24:00:00; the partition's by default
#   --stop_seconds=N       how long before that the run is asked to save its state, 120 by default
#   --partition=NAME, --account=NAME
#   --sbatch=OPTION        any other option of sbatch, such as --sbatch=--mem=64G; can be repeated
#   --python=PATH          python by default
#   --max_restarts=N       100 by default
#   --logs=DIRECTORY       where NAME-JOB.log is written, runs/slurm by default
#   --dry_run              prints the commands, and runs none
#
# Exit code: sbatch's. The job's own is that of the command, or 75 where no restarts are left.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' nodes=1 gpus_per_node=1 cpus_per_gpu=8 time='' stop_seconds=120 python=python
max_restarts=100 logs=runs/slurm
others=()
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --gpus_per_node=*) gpus_per_node=${1#*=} ;;
        --cpus_per_gpu=*) cpus_per_gpu=${1#*=} ;;
        --time=*) time=${1#*=} ;;
        --stop_seconds=*) stop_seconds=${1#*=} ;;
        --partition=* | --account=*) others+=("$1") ;;
        --sbatch=*) others+=("${1#*=}") ;;
        --python=*) python=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --logs=*) logs=${1#*=} ;;
        --dry_run) dry_run=yes ;;
        --help) show_help "${BASH_SOURCE[0]}" ;;
        --)
            shift
            break
            ;;
        *) unknown_option "$1" ;;
    esac
    shift
done
check --name "$name" '[A-Za-z0-9][A-Za-z0-9_.-]*' \
    "a name of letters, digits, dots, hyphens and underscores"
check_count --nodes "$nodes"
check_count --gpus_per_node "$gpus_per_node"
check_count --cpus_per_gpu "$cpus_per_gpu"
check_count --stop_seconds "$stop_seconds"
[[ $max_restarts == 0 ]] || check_count --max_restarts "$max_restarts"
[[ -z $time ]] || check --time "$time" '[0-9]+(-[0-9]+)?(:[0-9]+){0,2}' "a time such as 24:00:00"
check_command "$@"
program=$(command -v "$python") || die "there is no program $(quoted "$python"); --python names one."

# ---- The job. SIGTERM comes to the processes of the run, not to the shell of the job, which is to
# put the job back once they have saved the state.
job=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node"
    "--gpus-per-node=$gpus_per_node" "--cpus-per-task=$cpus_per_gpu"
    "--signal=TERM@$stop_seconds" --requeue --open-mode=append "--output=$logs/%x-%j.log")
[[ -z $time ]] || job+=("--time=$time")
job+=("${others[@]}")
run mkdir -p "$logs"
run "${job[@]}" "$ROOT/launch/slurm_job.sh" "$max_restarts" "$program" -m "$@"
say "the log is $logs/$name-JOB.log; scancel JOB ends the job."
