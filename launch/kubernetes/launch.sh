#!/usr/bin/env bash
#
# Runs a command of vqgan_jax on Kubernetes, as a JobSet of TPU or GPU hosts, until it is done.
#
#   launch/kubernetes/launch.sh OPTIONS -- vqgan_jax.NAME FLAGS
#   launch/kubernetes/launch.sh --name=f16 --image=IMAGE --kind=tpu --accelerator=tpu-v6e-slice \
#       --topology=4x4 --hosts=4 --per_host=4 --volume=runs:/runs \
#       -- vqgan_jax.train --config=configs/vqgan_f16.py --workdir=/runs/f16
#
# Fills in jobset-tpu.yaml or jobset-gpu.yaml beside this script, applies it and shows the log of the
# first pod. Where the run is stopped (exit code 75) or preempted, the cluster itself starts it
# again, with or without this script; the same call shows a run that is under way.
#
#   --name=NAME            of the JobSet
#   --image=IMAGE          made by the Dockerfile beside this script
#   --kind=tpu|gpu         which manifest
#   --accelerator=NAME     GKE's label of the nodes: for TPUs such as tpu-v6e-slice; for GPUs such as
#                          nvidia-h100-80gb, or none where the cluster is not GKE's
#   --topology=AxB[xC]     of the TPU slice, such as 4x4
#   --hosts=N              of the slice, or how many to use; 1 by default
#   --per_host=N           chips or GPUs of each host
#   --namespace=NAME       default by default
#   --spot                 on spot nodes of GKE
#   --service_account=NAME of Kubernetes, default by default
#   --volume=CLAIM:PATH    a persistent volume claim and where it is mounted; can be repeated. The
#                          run's directory must be on one that all hosts can write to
#   --env=NAME=VALUE       for the command's environment; can be repeated
#   --max_restarts=N       after failures other than stops and preemptions, 0 by default. A node that
#                          dies without notice can look like a failure of the others
#   --poll_seconds=N       between looks at the JobSet, 30 by default
#   --log=FILE             where the log is kept, runs/launch/NAME.log by default
#   --dry_run              prints the commands of a run that nothing interrupts, and runs none
#
# Exit codes: 0 the command is done; its own where it failed; 1 for what this script cannot do.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/../common.sh"

SHOWN_LINES=20

# ---- Options.
name='' image='' kind='' accelerator='' topology='' hosts=1 per_host='' namespace=default spot=no
service_account=default max_restarts=0 log=''
volumes=() environment=()
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --kind=*) kind=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --hosts=*) hosts=${1#*=} ;;
        --per_host=*) per_host=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --spot) spot=yes ;;
        --service_account=*) service_account=${1#*=} ;;
        --volume=*) volumes+=("${1#*=}") ;;
        --env=*) environment+=("${1#*=}") ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
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
label='[a-z0-9]([a-z0-9-]*[a-z0-9])?'
# Names of pods are longer by 21 characters and have at most 63.
check --name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
    "a name of up to 40 small letters, digits and hyphens that starts with a letter"
check --image "$image" '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "an image"
check --kind "$kind" 'tpu|gpu' "tpu or gpu"
check_count --hosts "$hosts"
check_count --per_host "$per_host"
check --namespace "$namespace" "$label" "a namespace"
check --service_account "$service_account" "$label" "a service account"
[[ $max_restarts == 0 ]] || check_count --max_restarts "$max_restarts"
check_count --poll_seconds "$poll_seconds"
if [[ $kind == tpu ]]; then
    check --accelerator "$accelerator" "$label" "an accelerator such as tpu-v6e-slice"
    check --topology "$topology" '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "a topology such as 4x4"
    ((${topology//x/*} == hosts * per_host)) ||
        die "--topology=$topology has $((${topology//x/*})) chips, and --hosts=$hosts with" \
            "--per_host=$per_host have $((hosts * per_host))."
else
    [[ -z $accelerator ]] || check --accelerator "$accelerator" "$label" "an accelerator"
    [[ -z $topology ]] || die "--topology is of TPUs; GPUs have none."
fi
for volume in "${volumes[@]}"; do
    check --volume "$volume" "$label:/[A-Za-z0-9._/-]+" "CLAIM:PATH"
done
for variable in "${environment[@]}"; do
    check --env "$variable" '[A-Za-z_][A-Za-z0-9_]*=.*' "NAME=VALUE"
done
check_command "$@"
: "${log:=runs/launch/$name.log}"

# ---- The manifest.
# A text as a JSON string, which is YAML too.
json() {
    local text=$1 backslash=\\
    [[ ! ${text//[$'\n\t']/} =~ [[:cntrl:]] ]] || die "$(quoted "$1") has characters of control."
    text=${text//"$backslash"/"$backslash$backslash"}
    text=${text//'"'/"$backslash\""}
    text=${text//$'\n'/"${backslash}n"}
    text=${text//$'\t'/"${backslash}t"}
    printf '"%s"' "$text"
}

# The same, where Kubernetes would take $(NAME) for a variable.
json_literal() {
    local dollars='$$'
    json "${1//'$'/"$dollars"}"
}

# Sets `manifest`, the file of the kind with everything filled in.
render() {
    local command='["python", "-m"' selector='' env='' mounts='' claims='' line text key value word i=0
    for word in "$@"; do
        command+=", $(json_literal "$word")"
    done
    command+=']'
    if [[ $kind == gpu && $accelerator ]]; then
        selector+="cloud.google.com/gke-accelerator: $(json "$accelerator")"$'\n'
    fi
    [[ $spot == no ]] || selector+=$'cloud.google.com/gke-spot: "true"\n'
    for word in "${environment[@]}"; do
        env+="- {name: $(json "${word%%=*}"), value: $(json_literal "${word#*=}")}"$'\n'
    done
    for word in "${volumes[@]}"; do
        mounts+="- {name: volume-$i, mountPath: $(json "${word#*:}")}"$'\n'
        claims+="- {name: volume-$i, persistentVolumeClaim: {claimName: $(json "${word%%:*}")}}"$'\n'
        i=$((i + 1))
    done
    manifest=''
    while IFS= read -r line; do
        if [[ $line =~ ^(\ *)@([A-Z_]+)@$ ]]; then # a line for each of several, or for none
            case ${BASH_REMATCH[2]} in
                NODE_SELECTOR) text=$selector ;;
                ENV) text=$env ;;
                MOUNTS) text=$mounts ;;
                VOLUMES) text=$claims ;;
            esac
            while IFS= read -r word; do
                [[ -z $word ]] || manifest+=${BASH_REMATCH[1]}$word$'\n'
            done <<<"$text"
            continue
        fi
        for key in "NAME=$name" "MAX_RESTARTS=$max_restarts" "HOSTS=$hosts" "PER_HOST=$per_host" \
            "SERVICE_ACCOUNT=$service_account" "ACCELERATOR=$accelerator" "TOPOLOGY=$topology" \
            "IMAGE=$(json "$image")"; do
            value=${key#*=}
            line=${line//"@${key%%=*}@"/"$value"}
        done
        # Last, since what a person wrote can contain anything.
        line=${line/'@COMMAND@'/"$command"}
        manifest+=$line$'\n'
    done <"$here/jobset-$kind.yaml"
}

# ---- The JobSet.
in_namespace=("--namespace=$namespace")
of_jobset=jobset.sigs.k8s.io/jobset-name=$name

apply() {
    if [[ $dry_run == yes ]]; then
        printf "%s <<'MANIFEST'\n%sMANIFEST\n" \
            "$(quoted kubectl apply "${in_namespace[@]}" --filename=-)" "$manifest" >&3
    else
        kubectl apply "${in_namespace[@]}" --filename=- <<<"${manifest%$'\n'}" ||
            die "cannot apply the JobSet $name; kubectl says why above."
    fi
}

# Prints none, active, Completed or Failed.
jobset_state() {
    local found
    found=$(persist kubectl get jobset "$name" "${in_namespace[@]}" --ignore-not-found \
        '--output=jsonpath={.metadata.name}:{.status.terminalState}') ||
        die "cannot ask for the JobSet $name; kubectl says why above."
    case $found in
        '') echo none ;;
        *:) echo active ;;
        *) echo "${found#*:}" ;;
    esac
}

# Shows the log of the newest first pod until it ends; fails where there is nothing new to show.
followed=''
follow() {
    local pod phase lines=-1
    pod=$(persist kubectl get pods "${in_namespace[@]}" \
        "--selector=$of_jobset,batch.kubernetes.io/job-completion-index=0" \
        --sort-by=.metadata.creationTimestamp \
        '--output=jsonpath={range .items[*]}{.metadata.name}:{.status.phase}{"\n"}{end}') ||
        die "cannot ask for the pods of $name; kubectl says why above."
    [[ $dry_run == no ]] || pod="$name-workers-0-0-POD:Running"
    pod=${pod##*$'\n'}
    phase=${pod#*:} pod=${pod%%:*}
    [[ -n $pod && $phase != Pending ]] || return 1
    if [[ $pod == "$followed" ]]; then
        [[ $phase == Running ]] || return 1
        lines=$SHOWN_LINES # the connection was broken
    fi
    followed=$pod
    run kubectl logs "$pod" "${in_namespace[@]}" --container=run --follow "--tail=$lines" |
        if [[ $dry_run == yes ]]; then cat; else tee -a "$log"; fi || true
}

# Ends with the exit code of the pod that failed first, after its last lines.
end_failed() {
    local pods code pod
    pods=$(persist kubectl get pods "${in_namespace[@]}" "--selector=$of_jobset" "--output=jsonpath=\
{range .items[*]}{.status.containerStatuses[0].state.terminated.finishedAt} \
{.status.containerStatuses[0].state.terminated.exitCode} {.metadata.name}{\"\\n\"}{end}") || pods=''
    read -r _ code pod <<<"$(sort <<<"$pods" | awk -v stopped="$STOPPED" \
        'NF == 3 && $2 != 0 && $2 != stopped { print; exit }')" || true
    [[ -n $pod ]] ||
        die "the JobSet $name failed; kubectl describe jobset $name --namespace=$namespace says why."
    [[ $pod == "$followed" ]] ||
        kubectl logs "$pod" "${in_namespace[@]}" --container=run "--tail=$SHOWN_LINES" || true
    say "the JobSet $name failed: exit code $code of $pod. The log is $log."
    exit "$code"
}

trap 'say "stopped watching. A run goes on, and the same call shows it again; kubectl delete jobset" \
    "$name --namespace=$namespace ends it."; exit 130' INT

render "$@"
state=$(jobset_state)
case $state in
    Completed | Failed)
        say "an earlier JobSet $name is there, $state; it is deleted."
        persist kubectl delete jobset "$name" "${in_namespace[@]}" ||
            die "cannot delete the JobSet $name; kubectl says why above."
        ;;
    active) say "the JobSet $name is under way." ;;
esac
apply
run mkdir -p "$(dirname "$log")"
while :; do
    state=$(jobset_state)
    case $state in
        Completed)
            say "done. The log is $log."
            exit 0
            ;;
        Failed) end_failed ;;
        none) [[ $dry_run == yes ]] || die "the JobSet $name was deleted." ;;
    esac
    if [[ $dry_run == yes ]]; then
        follow
        jobset_state >/dev/null
        exit 0
    fi
    follow || sleep "$poll_seconds"
done
