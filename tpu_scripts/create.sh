#!/bin/sh
# Creates a TPU VM.
#
#   sh tpu_scripts/create.sh --name=NAME [--type=v3-8] [--spot] [--queued] [--version=RUNTIME]
#
#   --type=TYPE        gcloud's name for one host's chips: v2-8, v3-8 (default), v4-8, v5litepod-8 (v5e), v5p-8, v6e-8
#   --spot             a cheaper VM that may be preempted at any time; train.sh continues from the newest checkpoint
#   --queued           wait in a queue instead of failing; the queued resource has the VM's name
#   --version=RUNTIME  the VM's image (default: plain Ubuntu for the type's generation)
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
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
if [ -z "$version" ]; then
  case $type in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5e-*) die "--type=$type: gcloud calls it v5litepod-${type#v5e-}" ;;
    *) die "--type=$type is not known here: give its --version, see https://cloud.google.com/tpu/docs/runtimes" ;;
  esac
fi
require_tpu

if [ -n "$queued" ]; then
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    ${spot:+"$spot"}
  suggest "Queued. The VM is ready when this prints ACTIVE:" \
    queued-resources describe "$name" --format='value(state.state)'
else
  tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+"$spot"}
fi
