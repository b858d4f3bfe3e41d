#!/bin/sh
# Trains on a TPU VM, in the background: runs experiments.train there with the arguments after --, on all chips of the
# slice. On a slice of several hosts each worker serves its chips, and worker 0 drives them; runs and data are in gs://.
#
#   sh tpu_scripts/train.sh --name=NAME -- --workdir=gs://BUCKET/RUN --dataset=cifar10 --data_dir=gs://BUCKET/tfds
#   sh tpu_scripts/train.sh --name=NAME --runner=jax -- EXPORT --workdir=runs/RUN --npz=FILE
#
#   --keep_alive  watch from here until the training has ended: continue it when it was interrupted, and create a slice
#                 anew that was preempted, with create.sh and setup.sh. Ctrl-C ends only the watching.
#   --runner=jax  train without TensorFlow: installs JAX with setup.sh, copies EXPORT, a folder here or in gs:// that
#                 `export --what=train_loop` wrote, and runs experiments.train_exported on every worker
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the commands)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# The same command again, on this VM or a new one, continues from the newest checkpoint.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source-path=SCRIPTDIR source=keep_alive.sh
. "$(dirname "$0")/keep_alive.sh"

keep_alive=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --keep_alive) keep_alive=yes ;;
    --runner=*) runner=${1#*=} ;;
    *) common_flag "$1" ;;
  esac
  shift
done
check_runner
require_tpu
[ $# -gt 1 ] || die "what to train is missing: ... -- --workdir=gs://BUCKET/RUN --dataset=PRESET"
shift

# Copies the export of the JAX runner into the checkout of every worker.
copy_export() {
  case $1 in
    gs://*)
      on_workers all "cd diffusion_tf && mkdir -p exports && gcloud storage cp --recursive $(quote "$1") exports/"
      ;;
    *)
      from=$(cd "$1" && pwd)
      enter_temporary_folder
      run tar -czf export.tar.gz -C "$(dirname "$from")" "$(basename "$from")"
      tpus tpu-vm scp export.tar.gz "$name:" --worker=all
      on_workers all 'mkdir -p diffusion_tf/exports && tar -xzf export.tar.gz -C diffusion_tf/exports'
      ;;
  esac
}

if [ "$runner" = jax ]; then
  [ -z "$keep_alive" ] || die "--keep_alive needs a run in gs://, and --runner=jax writes to the VM's disk"
  export=${1%/}
  case $export in
    gs://*) ;;
    *) [ -f "$export/manifest.json" ] || die "$1 is no folder that \`export --what=train_loop\` wrote" ;;
  esac
  shift
  sibling setup --runner=jax
  copy_export "$export"
  start_on_chips --runner=jax train train_exported "exports/$(basename "$export")" "$@"
elif [ -n "$keep_alive" ]; then
  keep_training "$@"
else
  start_on_chips train train "$@"
fi
