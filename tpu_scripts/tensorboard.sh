#!/bin/sh
# Shows a run's curves and samples in the browser, at http://localhost:6006.
#
#   sh tpu_scripts/tensorboard.sh --logdir=gs://BUCKET/RUN            TensorBoard here, reading the bucket
#   sh tpu_scripts/tensorboard.sh --name=NAME --logdir=runs/cifar10   TensorBoard on the VM, through ssh
#
#   --port=PORT  the port to use instead of 6006
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

logdir='' port=6006
while [ $# -gt 0 ]; do
  case $1 in
    --logdir=*) logdir=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    *) common_flag "$1" ;;
  esac
  shift
done
[ -n "$logdir" ] || die "--logdir is required: gs://BUCKET/RUN, or a folder on the VM"

case $logdir in
  gs://*)
    [ -n "$dry_run" ] || command -v tensorboard >/dev/null || die "tensorboard is missing: source .venv/bin/activate"
    run tensorboard --logdir="$logdir" --port="$port"
    ;;
  *)
    require_tpu
    # -t: Ctrl-C ends TensorBoard too. TensorBoard imports TensorFlow, which must not claim the chips of a training.
    tpus tpu-vm ssh "$name" --worker=0 --ssh-flag="-t -L $port:localhost:$port" --command="cd diffusion_tf && \
$(quote env TPU_LOAD_LIBRARY=0 .venv/bin/tensorboard --logdir="$logdir" --port="$port")"
    ;;
esac
