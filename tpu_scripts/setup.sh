#!/bin/sh
# Copies the last commit of this checkout to ~/diffusion_tf of a TPU VM, on every worker of a slice, and installs it
# there with install.sh.
#
#   sh tpu_scripts/setup.sh --name=NAME [--runner=jax]
#
#   --runner=jax  install JAX instead of TensorFlow (train.sh --runner=jax calls this script so)
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the commands)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# The same command again updates the VM to the checkout's new commit; runs and logs there stay.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  case $1 in
    --runner=*) runner=${1#*=} ;;
    *) common_flag "$1" ;;
  esac
  shift
done
check_runner
require_tpu

root=$(cd "$(dirname "$0")/.." && pwd)
install='sh diffusion_tf/tpu_scripts/install.sh'
[ "$runner" = tensorflow ] || install="$install --runner=$runner"
enter_temporary_folder
# A file, not a pipe: all workers of gcloud would share one standard input.
run git --git-dir="$root/.git" archive --format=tar.gz --output=diffusion_tf.tar.gz HEAD
tpus tpu-vm scp diffusion_tf.tar.gz "$name:" --worker=all
on_workers all "mkdir -p diffusion_tf && tar -xzf diffusion_tf.tar.gz -C diffusion_tf && $install"
