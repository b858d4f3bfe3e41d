#!/bin/sh
# Scores each checkpoint while training continues: runs experiments.evaluate --follow on the VM (of a slice, on worker
# 0), in the background, with the arguments after --.
#
#   sh tpu_scripts/evaluate.sh --name=NAME [--tpu] -- --workdir=gs://BUCKET/RUN --eval_every=20000 --num_samples=1000
#
# One process at a time can use a VM's chips, so beside a training this runs on the VM's CPU. That suffices for a few
# samples; for 50,000 create a second VM and use its chips with --tpu.
#
#   --tpu  run on all chips of the slice, which no other process may use
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

tpu=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --tpu) tpu=yes ;;
    *) common_flag "$1" ;;
  esac
  shift
done
require_tpu
[ $# -gt 1 ] || die "what to score is missing: ... -- --workdir=gs://BUCKET/RUN"
shift

if [ -n "$tpu" ]; then
  start_on_chips evaluate evaluate --follow "$@"
else
  # On import TensorFlow claims the chips unless TPU_LOAD_LIBRARY=0. The strategy mirrored, on one CPU, needs no XLA,
  # which tensorflow-tpu has for TPUs only.
  start_job evaluate env TPU_LOAD_LIBRARY=0 .venv/bin/python -m experiments.evaluate --follow --strategy=mirrored "$@"
fi
