#!/usr/bin/env bash
# GPUs on several nodes under SLURM: sbatch launch/slurm_gpu.sh. Not tested: see docs/pods.md.
#
# One process per GPU; they find each other through SLURM's variables. Two minutes before the time is up the run gets
# SIGTERM, saves, ends with status 143, and is requeued to resume.
#SBATCH --job-name=ifm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

CONFIG=${CONFIG:-configs/ifm_imagenet100.py}
DATA=${DATA:-folder:/data/imagenet}   # within reach of every node
WORKDIR=${WORKDIR:-runs/ifm100}       # on a file system that all nodes share
PYTHON=${PYTHON:-.venv/bin/python}    # pip install -e '.[cuda]'

srun --kill-on-bad-exit=0 "$PYTHON" train.py --config="$CONFIG" --config.data.source="$DATA" --workdir="$WORKDIR"
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
