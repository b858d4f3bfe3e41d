#!/bin/sh
# Says in which state a TPU VM is, and for each worker of a slice which jobs run and how the others ended.
#
#   sh tpu_scripts/status.sh --name=NAME
#
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the commands)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
#
# Jobs are train, evaluate, prepare_lsun and, on a slice of several hosts, serve_tpu. "ended with 75" means saved: train
# continues with the same command.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  common_flag "$1"
  shift
done
require_tpu

tpus tpu-vm describe "$name" --format='yaml(state,health,acceleratorType,runtimeVersion,schedulingConfig.spot)'
on_workers all 'sh diffusion_tf/tpu_scripts/jobs.sh'
