#!/bin/sh
# Shows the last lines that the jobs of a TPU VM printed, on every worker of a slice.
#
#   sh tpu_scripts/logs.sh --name=NAME [--job=train] [--lines=20] [--follow]
#
#   --job=JOB  only this one: train, evaluate or prepare_lsun, which run on worker 0, or serve_tpu, on every worker
#   --lines=N  so many lines of each log
#   --follow   go on as the logs grow, until Ctrl-C
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables TPU_NAME, ZONE and PROJECT replace flags.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

job='' lines=20 follow=''
while [ $# -gt 0 ]; do
  case $1 in
    --job=*) job=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow='-F ' ;;
    *) common_flag "$1" ;;
  esac
  shift
done
require_tpu
case $lines in
  '' | *[!0-9]*) die "--lines=$lines is no number" ;;
esac
case $job in
  *[!a-z_]*) die "--job=$job: choose train, evaluate, prepare_lsun or serve_tpu" ;;
esac

# The redirection silences a worker that has no such log.
on_workers all "cd diffusion_tf && hostname && tail $follow-v -n $lines ${job:-*}.log 2>/dev/null || true"
