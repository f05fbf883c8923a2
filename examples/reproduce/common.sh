# Sourced by SIZE.sh: trains the rows of one size, on this machine or as a SLURM job or job array.
set -eu

main() {
    local size=$1 options=() rows=()
    shift
    # Names up to the first option are rows; the rest is for mor train.
    while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
        rows+=("$1")
        shift
    done
    options=("$@")
    if [ ${#rows[@]} -eq 0 ]; then
        read -r -a rows <<<"${ROWS:-vanilla recursive-2 recursive-3 recursive-4 expert-2 expert-3 expert-4 expert-3-kv token-3}"
    fi
    # Of a job array (sbatch --array=0-8) each task trains one row.
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        rows=("${rows[$SLURM_ARRAY_TASK_ID]}")
    fi
    for row in "${rows[@]}"; do
        train_row "$size" "$row" "${options[@]+"${options[@]}"}"
    done
}

train_row() {
    local recipe=paper/$1-$2 folder=runs/paper-$1-$2 status=0
    shift 2
    case " $* " in *" --dry-run "*)
        mor train "$recipe" "$@"
        return
        ;;
    esac
    if [ -e "$folder/summary.json" ]; then
        echo "$folder is finished"
        return
    fi
    if [ -e "$folder/recipe.yaml" ]; then
        set -- --resume "$@"
    fi
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
        # One task for each GPU: each is told by SLURM itself to stop, saves, and exits with 130.
        srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
            LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec mor train "$@"' mor "$recipe" "$@" || status=$?
        if [ $status -eq 130 ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
    else
        torchrun --standalone --nproc-per-node "${GPUS:-8}" -m mor.cli train "$recipe" "$@" || status=$?
    fi
    return $status
}
