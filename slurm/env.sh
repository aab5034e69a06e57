# The environment of seqaware's jobs; the sbatch files source it. A site sets these variables where it submits (sbatch
# passes them on), or here:
#
#   SEQAWARE_VENV       the virtual environment; default: .venv in the repository
#   SEQAWARE_MODULES    environment modules to load, with blanks between them: "gcc/13 cuda/12.8"
#   SEQAWARE_CONTAINER  run inside an image: IMAGE.sif with Apptainer, anything else (IMAGE.sqsh, a registry's name) with
#                       Pyxis. It brings Python and the requirements; the code is the repository's.
#   SEQAWARE_MOUNTS     what the image sees beside the repository and the current folder: "/data:/data,/scratch:/scratch"
#   OMP_NUM_THREADS     default: the CPUs of a rank
#
# Sets `step_options` (for srun) and `python` (the command in front of a script). Prints nothing: variables may be secret.

refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

if [[ -n ${SEQAWARE_MODULES:-} ]]; then
    command -v module >/dev/null || refuse "SEQAWARE_MODULES is set, but there is no command \`module\` on $(hostname)"
    # Not quoted: several names.
    # shellcheck disable=SC2086
    module load $SEQAWARE_MODULES || refuse "a module of SEQAWARE_MODULES cannot be loaded; got $SEQAWARE_MODULES"
fi

step_options=()
mounts=$SEQAWARE_HOME:$SEQAWARE_HOME
[[ $PWD == "$SEQAWARE_HOME" ]] || mounts+=,$PWD:$PWD
mounts+=${SEQAWARE_MOUNTS:+,$SEQAWARE_MOUNTS}
case ${SEQAWARE_CONTAINER:-} in
    "")
        python=("${SEQAWARE_VENV:-$SEQAWARE_HOME/.venv}/bin/python")
        [[ -x ${python[0]} ]] ||
            refuse "there is no ${python[0]}; run install.sh, or set SEQAWARE_VENV or SEQAWARE_CONTAINER"
        PATH=$(dirname "${python[0]}"):$PATH
        ;;
    *.sif)
        python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$SEQAWARE_CONTAINER" python)
        ;;
    *)
        step_options=(--container-image="$SEQAWARE_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
        python=(python)
        ;;
esac

# srun no longer takes the CPUs of a task from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Lines reach the log when they are written, and are not lost with a rank that is killed.
export PYTHONUNBUFFERED=1
export PYTHONPATH=$SEQAWARE_HOME${PYTHONPATH:+:$PYTHONPATH}
