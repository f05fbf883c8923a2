#!/bin/bash
#SBATCH --job-name=mor-730m
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# The paper's 730m rows:  bash examples/reproduce/730m.sh [ROW...] [--dry-run] [options of mor train]
#               or:  sbatch --array=0-8 examples/reproduce/730m.sh    (one task for each row)
# From the repository's root, with mor on PATH and data/fineweb-edu-dedup prepared (docs/reproduction.md).
source examples/reproduce/common.sh
main 730m "$@"
