#!/usr/bin/env bash
#
# What launch/tpu_pod.sh runs on each worker of a TPU, from ~/vqgan_jax/source.
#
#   tpu_worker.sh install SETUP              Python, the package, then SETUP, a line of bash
#   tpu_worker.sh run START [NAME=VALUE ...] -- vqgan_jax.NAME FLAGS
#
# `run` starts the command in a session of its own, so that it outlives the connection, and waits for
# it; worker 0 shows its log. START names the start: a second `run` of it, after a broken connection,
# waits for the same process. The last line reports the exit code, also that of `run`, and its time.
# ~/vqgan_jax/run has the command, its `start`, `pid`, `log` and in the end its `exit_code`; `lock` is
# held for as long as any of its processes lives.
set -euo pipefail

ROOT=$HOME/vqgan_jax
RUN=$ROOT/run
PYTHON=$ROOT/venv/bin/python
STOPPED=75
COORDINATOR_PORT=8476 # as jax.distributed takes on TPUs
SHOWN_LINES=20

metadata() {
    curl --silent --show-error --fail --retry 5 --max-time 60 --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

under_way() {
    ! flock --nonblock "$RUN/lock" true
}

install() {
    mkdir -p "$RUN"
    if under_way; then
        echo "A run is under way here, so nothing is installed."
        return
    fi
    rm -f "$RUN/start" "$RUN/exit_code"
    # The VMs' own Python can be older than the package needs.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x $PYTHON ]] || uv venv --quiet --python 3.12 "$ROOT/venv"
    uv pip install --quiet --python "$PYTHON" "$ROOT/source[tpu]"
    bash -c "$1"
}

# Processes find each other by the VM's metadata, as they would by jax.distributed itself.
export_coordinator() {
    local endpoints
    IFS=, read -r -a endpoints <<<"$(metadata worker-network-endpoints)"
    if ((${#endpoints[@]} > 1)); then
        # Each is an address, or a name, a number and an address with colons between.
        export JAX_COORDINATOR_ADDRESS=${endpoints[0]##*:}:$COORDINATOR_PORT
        export JAX_NUM_PROCESSES=${#endpoints[@]} JAX_PROCESS_ID=$worker
    fi
}

# The process of a session of its own, which notes how the command ends.
supervise() {
    trap : TERM HUP # the command is to end first
    local code=0
    cd "$ROOT/source"
    PYTHONUNBUFFERED=1 env "$@" || code=$?
    echo "$code at $(date +%s.%N)" >"$RUN/exit_code.partial"
    mv "$RUN/exit_code.partial" "$RUN/exit_code"
}

run() {
    local start=$1 lines=$SHOWN_LINES shown environment=()
    shift
    while [[ $1 != -- ]]; do
        environment+=("$1")
        shift
    done
    shift
    shown=$(printf '%q ' "${environment[@]}" "$@")
    worker=$(metadata agent-worker-number)
    if under_way; then
        if [[ $(<"$RUN/command") != "$shown" ]]; then
            echo "error: worker $worker still runs another command: $(<"$RUN/command")"
            report "1 at $(date +%s.%N)"
        fi
        echo "$start" >"$RUN/start"
    elif [[ ! -f $RUN/start || $(<"$RUN/start") != "$start" ]]; then
        export_coordinator
        exec 9>"$RUN/lock"
        flock --nonblock 9
        touch "$RUN/log"
        lines=+$(($(wc -l <"$RUN/log") + 1))
        rm -f "$RUN/exit_code"
        echo "$shown" >"$RUN/command"
        echo "$start" >"$RUN/start"
        setsid bash "$0" supervise "${environment[@]}" "$PYTHON" -m "$@" \
            >>"$RUN/log" 2>&1 </dev/null &
        echo $! >"$RUN/pid"
        exec 9>&-
    fi
    if [[ $worker == 0 ]]; then
        tail --lines="$lines" --follow --sleep-interval=0.5 --pid="$(<"$RUN/pid")" "$RUN/log"
    fi
    while under_way; do
        sleep 0.5
    done
    if [[ ! -f $RUN/exit_code ]]; then
        echo "Worker $worker has lost its process, as where the VM was restarted."
        report "$STOPPED at $(date +%s.%N)"
    fi
    report "$(<"$RUN/exit_code")"
}

# Prints how the command ended, "CODE at TIME", and exits with the code.
report() {
    local code=${1%% *}
    if [[ $worker != 0 && $code != 0 && $code != "$STOPPED" ]]; then
        tail --lines="$SHOWN_LINES" "$RUN/log" | sed "s/^/worker $worker: /"
    fi
    echo "vqgan_jax worker $worker: exit code $1"
    ((code != 255)) || exit 1 # 255 would be taken for a broken connection
    exit "$code"
}

main() {
    case $1 in
        install) install "$2" ;;
        run) run "${@:2}" ;;
        supervise) supervise "${@:2}" ;;
    esac
    exit
}

# The file can be replaced while it runs, so all of it is read before anything is done.
main "$@"
