#!/bin/sh
# Runs a command on the VM, in the checkout, and keeps it running after the connection ends. The other scripts call it
# over ssh.
#
#   sh tpu_scripts/background.sh [--once] JOB COMMAND...
#
# Output goes to JOB.log, the process id to JOB.pid, and the exit code, when the command ends, to JOB.rc. A JOB that is
# still running is not started again: an error, unless --once.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

cd "$(dirname "$0")/.."
once=''
if [ "$1" = --once ]; then
  once=yes
  shift
fi
job=$1
shift
if job_is_running "$job"; then
  message="$job is still running, as process $(cat "$job.pid")"
  [ -n "$once" ] || die "$message"
  echo "$message"
  exit
fi

# Runs a command, and records its process id and its exit code.
record() {
  # The connection ends when nothing has its files open. A redirection of the call would keep copies of them.
  exec >>"$job.log" 2>&1 </dev/null
  trap '' HUP
  "$@" &
  echo $! >"$job.pid"
  code=0
  wait $! || code=$?
  echo "$code" >"$job.rc.tmp"
  mv "$job.rc.tmp" "$job.rc"
}
rm -f "$job.pid" "$job.rc"
record "$@" &
until [ -s "$job.pid" ]; do
  sleep 0.1
done
