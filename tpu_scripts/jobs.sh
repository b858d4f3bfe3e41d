#!/bin/sh
# Says what the jobs of this worker do (see background.sh). status.sh and train.sh --keep_alive call it over ssh.
#
#   sh tpu_scripts/jobs.sh [JOB]
#
# A line is "HOST: JOB is running, as process N", "... ended with CODE" or "... ended without an exit code", as after
# a reboot.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- *.pid
found=''
for job in "$@"; do
  job=${job%.pid}
  [ -f "$job.pid" ] || continue
  found=yes
  if job_is_running "$job"; then
    state="is running, as process $(cat "$job.pid")"
  elif [ -f "$job.rc" ]; then
    state="ended with $(cat "$job.rc")"
  else
    state='ended without an exit code'
  fi
  echo "$(hostname): $job $state"
done
[ -n "$found" ] || echo "$(hostname): no job has been started"
