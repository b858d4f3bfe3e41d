#!/bin/sh
# Trains on a TPU VM, in the background: runs experiments.train there with --tpu=local and the arguments after --.
#
#   sh tpu_scripts/train.sh --name=NAME -- --workdir=gs://BUCKET/RUN --dataset=cifar10 --data_dir=gs://BUCKET/tfds
#
#   --pjrt  for a v5e, v5p or v6e: TensorFlow uses the chips through PJRT
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# The same command again, on this VM or a new one, continues from the newest checkpoint.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --pjrt) pjrt=yes ;;
    *) common_flag "$1" ;;
  esac
  shift
done
require_tpu
[ $# -gt 1 ] || die "what to train is missing: ... -- --workdir=gs://BUCKET/RUN --dataset=PRESET"
shift

# One process drives all chips of the host.
start_job train .venv/bin/python -m experiments.train --tpu=local "$@"
