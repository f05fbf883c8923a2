#!/bin/bash
#SBATCH --job-name=mor-1.7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# The paper's 1.7b rows:  bash examples/reproduce/1.7b.sh [ROW...] [--dry-run] [options of mor train]
#               or:  sbatch --array=0-8 examples/reproduce/1.7b.sh    (one task for each row)
# From the repository's root, with mor on PATH and data/fineweb-edu-dedup prepared (docs/reproduction.md).
source examples/reproduce/common.sh
main 1.7b "$@"
