#!/usr/bin/env bash
#
# Runs a command of vqgan_jax on a TPU pod slice until it is done, whatever is preempted meanwhile.
#
#   launch/tpu_pod.sh OPTIONS -- vqgan_jax.NAME FLAGS
#   launch/tpu_pod.sh --name=f16 --zone=us-east5-b --accelerator_type=v6e-16 --spot \
#       -- vqgan_jax.train --config=configs/vqgan_f16.py --workdir=/mnt/runs/f16
#
# Creates the slice as a queued resource, or takes the TPU of that name that there is; installs the
# package on all workers; runs the command there and shows the log of worker 0. After preemption the
# slice is deleted and created again. The command outlives the connection: where this script was
# stopped, the same call finds the run and shows it again.
#
#   --name=NAME              of the TPU and of its queued resource
#   --zone=ZONE              such as us-east5-b
#   --project=PROJECT        gcloud's own by default
#   --accelerator_type=TYPE  such as v5litepod-16, v5p-32 or v6e-16; needed to create a slice
#   --runtime_version=NAME   of the VM; by default v2-alpha-tpuv5-lite for v5litepod, v2-alpha-tpuv5
#                            for v5p, v2-alpha-tpuv6e for v6e and tpu-ubuntu2204-base before these
#   --spot, --reserved       which capacity; on-demand without either
#   --service_account=EMAIL  of the VMs
#   --setup=COMMAND          of bash, on each worker before the run, such as one that mounts a
#                            bucket; it must bear to be run twice
#   --env=NAME=VALUE         for the command's environment; can be repeated
#   --max_restarts=N         after preemptions and stops, 100 by default
#   --at_end=keep|delete     the TPU once the command has ended, keep by default
#   --poll_seconds=N         between looks at the TPU, 30 by default; trouble with the connection is
#                            waited out for 1, 2, 4 and 8 times as long
#   --log=FILE               where the log of worker 0 is kept, runs/launch/NAME.log by default
#   --dry_run                prints the commands of a run that nothing interrupts, and runs none
#
# Exit codes: 0 the command is done; its own where it failed; 75 no restarts are left; 1 for what
# this script cannot do; 255 where the service or the workers could not be reached in 5 tries.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NO_CONNECTION=255 # as of ssh

# ---- Options.
name='' zone='' project='' accelerator_type='' runtime_version='' service_account='' setup='' log=''
capacity='' max_restarts=100 at_end=keep
environment=()
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --accelerator_type=*) accelerator_type=${1#*=} ;;
        --runtime_version=*) runtime_version=${1#*=} ;;
        --spot | --reserved)
            [[ -z $capacity || $capacity == "$1" ]] || die "--spot and --reserved exclude each other."
            capacity=$1
            ;;
        --service_account=*) service_account=${1#*=} ;;
        --setup=*) setup=${1#*=} ;;
        --env=*) environment+=("${1#*=}") ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --at_end=*) at_end=${1#*=} ;;
        --poll_seconds=*) poll_seconds=${1#*=} ;;
        --log=*) log=${1#*=} ;;
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
check --name "$name" '[a-z]([a-z0-9-]{0,60}[a-z0-9])?' \
    "a name of small letters, digits and hyphens that starts with a letter"
check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-b"
[[ -z $project ]] || check --project "$project" '[a-z0-9][a-z0-9.:-]*' "a project"
[[ -z $accelerator_type ]] || check --accelerator_type "$accelerator_type" 'v[0-9][a-z0-9]*-[0-9]+' \
    "an accelerator type such as v6e-16"
[[ -z $runtime_version ]] || check --runtime_version "$runtime_version" '[a-z0-9.-]+' \
    "a runtime version such as v2-alpha-tpuv6e"
[[ -z $service_account ]] || check --service_account "$service_account" '[^[:space:]@]+@[^[:space:]@]+' \
    "an e-mail address"
for variable in "${environment[@]}"; do
    check --env "$variable" '[A-Za-z_][A-Za-z0-9_]*=.*' "NAME=VALUE"
done
[[ $max_restarts == 0 ]] || check_count --max_restarts "$max_restarts"
check_count --poll_seconds "$poll_seconds"
check --at_end "$at_end" 'keep|delete' "keep or delete"
check_command "$@"
case $accelerator_type in
    v5litepod-*) default_version=v2-alpha-tpuv5-lite ;;
    v5p-*) default_version=v2-alpha-tpuv5 ;;
    v6e-*) default_version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) default_version=tpu-ubuntu2204-base ;;
    '') default_version='' ;;
    *) [[ $runtime_version ]] || die "no default is known for $accelerator_type: add --runtime_version." ;;
esac
runtime_version=${runtime_version:-$default_version}
: "${log:=runs/launch/$name.log}"
archive=$(dirname "$log")/vqgan_jax_source.tar.gz # its name is that of the copy on the workers
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")
if [[ $1 == vqgan_jax.train && " $*" != *' --workdir=/'* ]]; then
    say "warning: --workdir is no absolute path: checkpoints stay on the workers' disks, and are" \
        "lost with the TPU."
fi

# ---- The TPU.
# Sets `state` to absent, waiting, ready or lost, `shown_state` to the words of the service, and
# `workers` to how many there are. A list that is empty is an answer, other than a failing describe.
# The VM comes second, since it is there before its queued resource is active.
assumed_state=absent # by a dry run
look() {
    local vm queue node=''
    queue=$(persist gcloud compute tpus queued-resources list "${place[@]}" \
        "--filter=name~/$name\$" "--format=value(state.state)") || cannot_look
    vm=$(persist gcloud compute tpus tpu-vm list "${place[@]}" "--filter=name~/$name\$" \
        "--format=value(state,networkEndpoints.len())") || cannot_look
    if [[ $dry_run == yes ]]; then
        state=$assumed_state workers=1 queued=yes
        return
    fi
    read -r node workers <<<"$vm" || true
    queued=$([[ -z $queue ]] && echo no || echo yes)
    shown_state=$queue${queue:+, VM }${node:-none}
    case $queue,$node in
        ,) state=absent ;;
        FAILED,* | SUSPENDING,* | SUSPENDED,* | *,PREEMPTED | *,TERMINATED | ACTIVE,) state=lost ;;
        ,READY | ACTIVE,READY) state=ready ;;
        *,STOPPED | *,STOPPING) die "$name is stopped; start it, or choose another --name." ;;
        *) state=waiting ;;
    esac
}

cannot_look() {
    say "gave up after $TRIES tries: cannot ask for the state of $name; gcloud says why above."
    exit "$NO_CONNECTION"
}

create() {
    [[ $accelerator_type ]] ||
        die "there is no TPU $name in $zone; --accelerator_type says what to create."
    local command=(gcloud compute tpus queued-resources create "$name" "--node-id=$name"
        "${place[@]}" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
    [[ -z $capacity ]] || command+=("$capacity")
    [[ -z $service_account ]] || command+=("--service-account=$service_account")
    say "creating $name, $accelerator_type in $zone."
    assumed_state=ready
    run "${command[@]}" && return
    # What is refused the first time is a wrong option or a missing quota, which waiting cannot mend.
    ((restarts)) || die "cannot create $name; gcloud says why above."
    note_failure "cannot create $name"
}

delete() {
    if [[ $queued == yes ]]; then
        persist gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    else
        persist gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    fi || die "cannot delete $name, which still costs; gcloud says why above."
    seen=no
}

# Counts a restart, for the reason in the words.
count_restart() {
    if ((restarts == max_restarts)); then
        say "$*, and no restarts are left of $max_restarts. The same call goes on from there."
        exit "$STOPPED"
    fi
    restarts=$((restarts + 1))
    say "$*; restart $restarts of at most $max_restarts."
}

# Returns once there is a TPU that can be used.
seen=no
make_ready() {
    local shown=''
    look
    until [[ $state == ready ]]; do
        case $state in
            absent)
                # Preemption leaves the queued resource; a person has deleted it.
                [[ $seen == no ]] || die "$name was deleted while it was in use."
                create
                ;;
            lost)
                [[ $seen == yes ]] || sleep "$poll_seconds" # it could not even be provided
                count_restart "$name is lost ($shown_state)"
                delete
                installed=no failures=0
                ;;
            waiting)
                [[ $shown == "$shown_state" ]] || say "waiting for $name ($shown_state)."
                shown=$shown_state
                sleep "$poll_seconds"
                ;;
        esac
        look
    done
    seen=yes
}

# ---- The workers.
# Runs a line of bash on all workers. A connection that is silent for two minutes is broken; without
# that, the one to a VM that has vanished stays for hours.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 "--command=$1" </dev/null
}

install_package() {
    run mkdir -p "$(dirname "$log")" &&
        run tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" \
            setup.py pyproject.toml README.md vqgan_jax configs launch &&
        run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all &&
        on_workers "mkdir -p vqgan_jax/source && tar -xzf vqgan_jax_source.tar.gz -C vqgan_jax/source \
&& bash vqgan_jax/source/launch/tpu_worker.sh install $(quoted "$setup")"
}

# Runs the command on all workers and returns gcloud's exit code. Of several failing workers that is
# the code of the one with the lowest number, and 1 may be gcloud's own; so `reports` becomes what
# the workers themselves report, a line for each, in the order in which they ended: the first failure
# is the one that the others followed from.
run_command() {
    local code=0 size=0
    local command
    command="bash vqgan_jax/source/launch/tpu_worker.sh run $restarts $(quoted \
        "${environment[@]}" -- "$@")"
    if [[ $dry_run == yes ]]; then
        on_workers "$command"
        return
    fi
    [[ ! -f $log ]] || size=$(wc -c <"$log")
    on_workers "$command" 2>&1 | tee -a "$log" || code=$?
    reports=$(tail -c "+$((size + 1))" "$log" |
        grep -Eao 'vqgan_jax worker [0-9]+: exit code [0-9]+ at [0-9.]+' |
        sort -n -k8,8 | cut -d' ' -f2-6) || true
    return "$code"
}

# ---- The run.
finish() {
    if [[ $at_end == delete ]]; then
        delete
        say "$name is deleted."
    else
        say "$name is kept, and costs; --at_end=delete would delete it."
    fi
    exit "$1"
}

# Ends after TRIES failures in a row that nothing but the connection explains.
note_failure() {
    failures=$((failures + 1))
    if ((failures == TRIES)); then
        say "gave up after $TRIES tries: $1. $name is kept; the same call tries again."
        exit "$NO_CONNECTION"
    fi
    wait_out "$failures" "$1"
}

trap 'say "stopped watching. A run on $name goes on, and the same call shows it again."; exit 130' INT

restarts=0 failures=0 installed=no reports=''
while :; do
    make_ready
    if [[ $installed == no ]]; then
        say "installing the package on $workers worker(s) of $name."
        if ! install_package; then
            look
            [[ $state != ready ]] || note_failure "cannot install the package on $name"
            continue
        fi
        installed=yes
    fi
    say "running: $(quoted "$@")"
    code=0
    run_command "$@" || code=$?
    if ((code == 0)); then
        say "done. The log is $log."
        finish 0
    fi
    look
    [[ $state == ready ]] || continue # as where it was preempted
    if (($(cut -d: -f1 <<<"$reports" | sort -u | grep -c .) < workers)); then
        note_failure "lost the connection to $name (exit code $code)"
        continue
    fi
    failures=0
    # What one worker cannot do alone, code 1, the others take for its being gone, and end with 75.
    failed=$(grep -v 'exit code 0$' <<<"$reports" | head -n 1)
    if [[ ${failed##* } != 1 ]] && grep -q "exit code $STOPPED\$" <<<"$reports"; then
        count_restart "the run was stopped, and has saved its state"
        continue
    fi
    say "failed: $failed. The log of worker 0 is $log; each worker keeps its own in vqgan_jax/run/log."
    finish "${failed##* }"
done
