#!/usr/bin/env bash
# One GPU with about 16 GB, such as Colab's: small images or a small network. Not tested there: see docs/pods.md.
#
# In a notebook: !git clone REPOSITORY ifm_jax && cd ifm_jax && bash launch/small_gpu.sh
# With the workdir on a mounted drive, the same command resumes where a lost session ended.
set -euo pipefail

DATA=${DATA:-trifeature}              # or folder:PATH, with CONFIG=configs/ifm_own_images.py
CONFIG=${CONFIG:-configs/trifeature.py}
WORKDIR=${WORKDIR:-runs/small}        # for example /content/drive/MyDrive/ifm
PYTHON=${PYTHON:-python3}

"$PYTHON" -m pip install --quiet -e '.[cuda]'
exec "$PYTHON" train.py --config="$CONFIG" --config.data.source="$DATA" --workdir="$WORKDIR" \
    --config.checkpoint_every=200 "$@"
