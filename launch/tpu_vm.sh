#!/usr/bin/env bash
# A TPU VM pod slice: create, install, train, delete. From any machine with gcloud. Not tested: see docs/pods.md.
#
#     launch/tpu_vm.sh create && launch/tpu_vm.sh install && launch/tpu_vm.sh train
#
# `train` resumes the run in the workdir; `stop` sends SIGTERM, which saves first.
set -euo pipefail

NAME=${NAME:-ifm}
ZONE=${ZONE:-us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-64}     # 64 chips of v5e: topology v5e:8x8
VERSION=${VERSION:-v2-alpha-tpuv5-lite}      # the image for v5e
REPOSITORY=${REPOSITORY:?address of the git repository of ifm_jax}
BUCKET=${BUCKET:?name of the bucket with tfds/imagenet2012 in it, and for runs/}
CONFIG=${CONFIG:-configs/ifm_imagenet_pod.py}
RUN=${RUN:-ifm_pod}

everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --version="$VERSION"
    ;;
install)
    everywhere "sudo apt-get install --quiet --yes python3.11-venv &&
        git clone '$REPOSITORY' ifm_jax && cd ifm_jax && python3.11 -m venv .venv &&
        .venv/bin/pip install --quiet -e '.[tpu,tfds]'"
    # One bucket for all hosts: the images, read through a cache on the local disk, and the workdir.
    everywhere "mkdir -p ~/bucket ~/cache && (mountpoint -q ~/bucket ||
        gcsfuse --implicit-dirs --cache-dir=\$HOME/cache --file-cache-max-size-mb=-1 \
            --file-cache-cache-file-for-range-read '$BUCKET' ~/bucket)"
    ;;
train)
    # All hosts run the same command and find each other by what Cloud TPU tells them.
    everywhere "cd ifm_jax && TFDS_DATA_DIR=~/bucket/tfds .venv/bin/python train.py --config='$CONFIG' \
        --config.data.source=tfds:imagenet2012 --workdir=\$HOME/bucket/runs/'$RUN'"
    ;;
stop)
    everywhere "pkill -TERM -f '[t]rain.py' || true"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
    ;;
*)
    echo "usage: $0 create|install|train|stop|delete" >&2
    exit 2
    ;;
esac
