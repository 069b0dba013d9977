# shellcheck shell=bash
# What the launch scripts share: errors, commands that are run or only printed, patience, checks.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034  # the scripts that source this file use it
STOPPED=75 # vqgan_jax ends with it when it was stopped and its state is saved
TRIES=5    # of what can fail because of the connection
poll_seconds=30
dry_run=no

exec 3>&1 # where a dry run prints, also from within $(...)

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Empty arrays are errors before, and quotes in replacements stay.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
    die "bash $BASH_VERSION is too old; 4.4 is needed (on macOS: brew install bash)."

# A line of the launcher itself, with the time, so that it can be told from the run's own lines.
say() {
    [[ $dry_run == yes ]] || printf '%s launch: %s\n' "$(date '+%F %T')" "$*" >&2
}

# The words as one line that a shell reads as these words.
quoted() {
    printf '%q' "$1"
    (($# == 1)) || printf ' %q' "${@:2}"
}

# Runs a command; a dry run prints it.
run() {
    if [[ $dry_run == yes ]]; then
        printf '%s\n' "$(quoted "$@")" >&3
    else
        "$@"
    fi
}

# Runs a command up to TRIES times, longer apart each time.
persist() {
    local try code
    for ((try = 1; ; try++)); do
        code=0
        run "$@" || code=$?
        ((code)) || return 0
        ((try < TRIES)) || return "$code"
        wait_out "$try" "$1 ended with exit code $code"
    done
}

# Waits as long as failure number $1 asks for.
wait_out() {
    local seconds=$((poll_seconds << ($1 - 1)))
    say "$2; trying again in $seconds s."
    sleep "$seconds"
}

# Prints the header of a script, which is its help.
show_help() {
    sed -e '1,2d' -e '/^[^#]/,$d' -e 's/^# \{0,1\}//' "$1"
    exit 0
}

unknown_option() {
    die "unknown option $(quoted "$1"); see --help. The command comes after --."
}

# Whether VALUE is what option NAME takes: check NAME VALUE REGULAR_EXPRESSION WORDS.
check() {
    [[ $2 =~ ^($3)$ ]] || die "$1=$(quoted "$2") is not $4."
}

check_count() {
    check "$1" "$2" '[1-9][0-9]{0,5}' "a whole number from 1 to 999999"
}

# Whether the words after -- are a command of the package.
check_command() {
    (($#)) || die "no command; it comes after --, as in: -- vqgan_jax.train --config=configs/FILE.py"
    if [[ ! $1 =~ ^vqgan_jax\.[a-z_]+$ || ! -f $ROOT/${1/.//}.py ]]; then
        die "$(quoted "$1") is no command of the package; commands are vqgan_jax.train and the like."
    fi
}
