#!/bin/sh
# Prepares LSUN on a TPU VM, in the background: runs experiments.prepare_lsun there with the arguments after --.
#
#   sh tpu_scripts/prepare_lsun.sh --name=NAME \
#     --download=http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip -- --name=church --out=gs://BUCKET/lsun
#
#   --download=URL  download this zip to ~/diffusion_tf of the VM, unpack it, and pass its folder as --source
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# The same command again continues the download and writes the missing files.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

url=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --download=*) url=${1#*=} ;;
    *) common_flag "$1" ;;
  esac
  shift
done
require_tpu
[ $# -gt 1 ] || die "what to prepare is missing: ... -- --source=FOLDER --name=church --out=gs://BUCKET/lsun"
shift

# prepare_lsun writes files with TensorFlow, which must not claim the chips of a training.
if [ -n "$url" ]; then
  zip=${url##*/}
  steps="wget --continue $(quote "$url") && .venv/bin/python -m zipfile -e $(quote "$zip") . && exec env \
TPU_LOAD_LIBRARY=0 .venv/bin/python -m experiments.prepare_lsun $(quote --source="${zip%.zip}" "$@")"
  start_job prepare_lsun sh -c "$steps"
else
  start_job prepare_lsun env TPU_LOAD_LIBRARY=0 .venv/bin/python -m experiments.prepare_lsun "$@"
fi
