#!/bin/bash
# One node's part of a run: `srun deploy/train_node.sh RECIPE [OPTIONS of mor train]`, or by hand on
# every node with NNODES, FIRST and GPUS set. A run whose folder exists goes on from its checkpoint.
set -euo pipefail

recipe=$1
shift
nodes=${NNODES:-${SLURM_NNODES:-1}}
first=${FIRST:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)}
processes=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
run=$(python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["output"])' "$recipe")
resume=()
[ -d "$run/checkpoints" ] && resume=(--resume)

# --max-restarts: where a process dies, the processes of all nodes are started again, and --resume
# finds the newest checkpoint that is whole.
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-mor}" --rdzv-endpoint "${first:-localhost}:29500" \
    --max-restarts 3 --no-python \
    python -m mor.cli train "$recipe" "${resume[@]}" "$@"
