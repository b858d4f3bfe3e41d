#!/bin/sh
# Deletes a TPU VM and its disk without asking. Files in gs:// stay.
#
#   sh tpu_scripts/delete.sh --name=NAME [--queued]
#
#   --queued  for a VM created with --queued: deletes the queued resource too
#   --zone=ZONE, --project=PROJECT, --dry_run (only print the command)
#   The variables ZONE and PROJECT replace flags. TPU_NAME does not: a deletion names its VM.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

name='' queued=''
while [ $# -gt 0 ]; do
  case $1 in
    --queued) queued=yes ;;
    *) common_flag "$1" ;;
  esac
  shift
done
require_tpu

if [ -n "$queued" ]; then
  tpus queued-resources delete "$name" --force --quiet
else
  tpus tpu-vm delete "$name" --quiet
fi
[ -n "$dry_run" ] || echo "$name is deleted. Files in gs:// stay, and cost money, until you delete them."
