#!/usr/bin/env bash
# One machine with one or more GPUs: a single process uses all of them. Not tested on several: see docs/pods.md.
#
# The same command resumes the run in the workdir. To choose GPUs: CUDA_VISIBLE_DEVICES=0,1,2,3 launch/gpu_box.sh
set -euo pipefail

CONFIG=${CONFIG:-configs/ifm_imagenet100.py}
DATA=${DATA:-folder:/data/imagenet}
WORKDIR=${WORKDIR:-runs/ifm100}
PYTHON=${PYTHON:-.venv/bin/python}    # pip install -e '.[cuda]'

exec "$PYTHON" train.py --config="$CONFIG" --config.data.source="$DATA" --workdir="$WORKDIR" "$@"
