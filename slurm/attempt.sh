# One attempt of a training job: what happens between its start on some nodes and its end, or its return to the queue.
# Sourced by train.sbatch and sweep.sbatch, after env.sh.

readonly SAVED_AND_LEFT=85 # launcher/train.py saved a checkpoint and left because it was asked to
readonly TOO_EARLY=140     # 128 + SIGUSR2: asked to leave before it could listen, so that nothing is lost either

asked_to_leave=
heard=
step=

# SLURM signals this script alone (--signal=B:…). It then holds whatever it is at: the doctor, a container's download, or
# the ranks, to whom srun passes the signal on.
hear() {
    asked_to_leave=yes
    heard=yes
    [[ -z $step ]] || kill -USR2 "$step" 2>/dev/null || true
}
trap hear USR2

begin_attempt() {
    local restarts=${SLURM_RESTART_COUNT:-0} i
    printf '==== job %s, attempt %d, on %s, %(%F %T)T\n' "$(job_name)" $((restarts + 1)) "$SLURM_JOB_NODELIST" -1
    # A kill that SLURM still had queued for the step of an earlier attempt would hit the step of the same number now. One
    # empty step for each earlier attempt, and one for its doctor, use those numbers up.
    for ((i = 0; i < 2 * restarts; i++)); do
        srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true >/dev/null 2>&1 || true
    done
}

# $@: arguments of launcher/train.py, the config first. The doctor's table, of all ranks; an error in it ends the job.
consult_doctor() {
    local about=("$1")
    shift
    while [[ $# -gt 0 ]]; do
        case $1 in
            --set | --deepspeed) about+=("$1" "${2:-}") ;;
            --set=* | --deepspeed=*) about+=("$1") ;;
        esac
        shift
    done
    run_ranks doctor.py "${about[@]}" || end_attempt $? "the doctor"
}

# $@: arguments of launcher/train.py.
train() {
    local code=0
    run_ranks train.py "$@" || code=$?
    # Ranks that SLURM asked to leave and then killed have not failed: what they had saved before holds.
    [[ -z $asked_to_leave || $code -le 128 ]] || code=$SAVED_AND_LEFT
    end_attempt "$code" "training"
}

# $@: a file of launcher/ and its arguments, on all ranks of all nodes. The first that fails ends the others, but for the
# doctor's, among whom the one that has the table would lose it. srun works in the background, because bash hears no signal
# while it waits for a command in the foreground.
run_ranks() {
    local code=0 once_one_fails=(--kill-on-bad-exit=1)
    [[ -z $asked_to_leave ]] || return $SAVED_AND_LEFT
    [[ $1 != doctor.py ]] || once_one_fails=(--kill-on-bad-exit=0 --wait=120)
    srun "${once_one_fails[@]}" --label "${step_options[@]}" \
        bash "$SEQAWARE_HOME/slurm/rank.sh" "${python[@]}" "$SEQAWARE_HOME/launcher/$1" "${@:2}" &
    step=$!
    [[ -z $asked_to_leave ]] || hear # it came while srun had no number yet
    while true; do
        heard=
        code=0
        wait "$step" || code=$?
        [[ -n $heard ]] || break
    done
    step=
    ((code <= 100 || code >= 128)) || code=$((code - 100))
    return "$code"
}

# $1: exit code. $2: what ended.
end_attempt() {
    case $1 in
        0)
            printf '==== %s is done\n' "$2"
            ;;
        "$SAVED_AND_LEFT" | "$TOO_EARLY")
            printf '==== %s was asked to leave; the job goes back to the queue\n' "$2"
            scontrol requeue "$(job_name)" || printf 'error: it could not be requeued; the same sbatch goes on\n' >&2
            ;;
        *)
            # SLURM itself requeues it where the reason is a node that died.
            printf '==== %s ended with %d; the script does not requeue the job\n' "$2" "$1" >&2
            ;;
    esac
    exit "$1"
}

# A task of an array by both numbers: to requeue the one whose own number is the array's would requeue them all.
job_name() {
    printf '%s' "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] || printf '%s' "$SLURM_JOB_ID"
}
