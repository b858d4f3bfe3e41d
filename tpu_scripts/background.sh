#!/bin/sh
# Runs a command on the VM, in the checkout, and keeps it running after the connection ends. The other scripts call it
# over ssh.
#
#   sh tpu_scripts/background.sh JOB COMMAND...
#
# Output goes to JOB.log, the process id to JOB.pid. A JOB that is still running is not started again.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

cd "$(dirname "$0")/.."
job=$1
shift
pid=$(cat "$job.pid" 2>/dev/null || true)
if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
  die "$job is still running, as process $pid"
fi
nohup "$@" >>"$job.log" 2>&1 </dev/null &
echo $! >"$job.pid"
