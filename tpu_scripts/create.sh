#!/bin/sh
# Creates a TPU VM, or a slice of several.
#
#   sh tpu_scripts/create.sh --name=NAME [--type=v3-8] [--spot] [--queued] [--version=IMAGE]
#
#   --type=TYPE      gcloud's name for the chips: v2-8, v3-8 (default), v4-8, v5litepod-8 (v5e), v5p-8 and v6e-8 have
#                    one host; larger ones, like v3-32, have several
#   --spot           a cheaper VM that may be preempted at any time; train.sh continues from the newest checkpoint
#   --queued         wait in a queue instead of failing; the queued resource has the VM's name
#   --version=IMAGE  the VM's image (default: plain Ubuntu for the type's generation, which both runners need)
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# A type on which the programs do not run is refused before anything is bought.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

type=v3-8 version='' spot='' queued=''
while [ $# -gt 0 ]; do
  case $1 in
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --queued) queued=yes ;;
    *) common_flag "$1" ;;
  esac
  shift
done
# The sizes of v2 and v3 are those whose layout TensorFlow's server for slices knows.
case $type in
  v5e-*) die "--type=$type: gcloud calls it v5litepod-${type#v5e-}" ;;
  tpu7x-* | v7x-* | v7-*)
    die "--type=$type: Compute Engine and GKE create TPU7x, the Cloud TPU API of these scripts none: choose v6e-8, say"
    ;;
  *-*[!0-9]* | *-) image='' ;;
  v2-8 | v2-32 | v2-128 | v2-256 | v2-512) image=tpu-ubuntu2204-base ;;
  v3-8 | v3-32 | v3-64 | v3-128 | v3-256 | v3-512 | v3-1024 | v3-2048) image=tpu-ubuntu2204-base ;;
  v2-* | v3-*) die "--type=$type is no size of ${type%-*}: choose ${type%-*}-8, ${type%-*}-32, ${type%-*}-128, ..." ;;
  v4-*) image=tpu-ubuntu2204-base ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) image='' ;;
esac
[ -n "$image" ] ||
  die "--type=$type is not known here: choose v2-8, v3-8, v4-8, v5litepod-8, v5p-8, v6e-8 or a larger one"
version=${version:-$image}
require_tpu

if [ -n "$queued" ]; then
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    ${spot:+"$spot"}
  suggest "Queued. The VM is ready when this prints ACTIVE:" \
    queued-resources describe "$name" --format='value(state.state)'
else
  tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+"$spot"}
fi
