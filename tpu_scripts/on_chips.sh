#!/bin/sh
# Starts a program on the chips of this worker, in the background. The other scripts call it over ssh, on every worker
# of a slice.
#
#   sh tpu_scripts/on_chips.sh [--once] [--runner=jax] JOB PROGRAM ARGUMENTS...
#
# TensorFlow: on a slice of one host, the program drives the host's chips. On a slice of several, each worker serves its
# chips (experiments.serve_tpu), and worker 0 runs the program, which drives all of them.
# JAX: each worker runs the program.
# --once: a job that is still running is no error.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

scripts=$(cd "$(dirname "$0")" && pwd)
cd "$scripts/.."
once='' runner=tensorflow
while :; do
  case $1 in
    --once) once=--once ;;
    --runner=*) runner=${1#*=} ;;
    *) break ;;
  esac
  shift
done
job=$1 program=experiments.$2
shift 2

# Prints what the metadata server tells a worker of a slice. curl tries again after 408, 429 and 5xx.
metadata() {
  curl --silent --show-error --fail --retry 5 --max-time 10 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1" ||
    die "the metadata server does not tell $1: is this machine a TPU VM?"
}

# Checks that paths are in gs://, where all workers can reach them. Worker 0 says what is wrong, for all.
require_buckets() {
  for word in "$@"; do
    case $word in
      --workdir=gs://* | --data_dir=gs://*) ;;
      --workdir=* | --data_dir=*)
        [ "$worker" = 0 ] || exit 1
        die "$word: the $hosts hosts of this slice share no disk: name a path in gs://"
        ;;
    esac
  done
}

background() {
  sh "$scripts/background.sh" "$@"
}

worker=$(metadata agent-worker-number)
endpoints=$(metadata worker-network-endpoints)
hosts=$(echo "$endpoints" | tr , '\n' | grep -c ':.*:') || hosts=0
case $worker in
  '' | *[!0-9]*) die "the metadata server says that this is worker '$worker'" ;;
esac
[ "$hosts" -gt "$worker" ] ||
  die "the metadata server names no worker $worker: worker-network-endpoints is '$endpoints'"

# The lock ends with the program that holds it. On a slice, a second program would end the first one's session.
flock --nonblock chips.lock true || job_is_running "$job" ||
  die "another job uses the chips: sh tpu_scripts/status.sh shows it"
on_chips="flock --nonblock --no-fork chips.lock"

# shellcheck disable=SC2086 # $once, $on_chips and $pjrt are words or nothing
if [ "$runner" = jax ]; then
  # A server of TensorFlow holds the chips until it ends.
  ! job_is_running serve_tpu || kill "$(cat serve_tpu.pid)"
  while job_is_running serve_tpu; do
    sleep 1
  done
  [ "$hosts" = 1 ] || set -- "$@" --distributed
  background $once "$job" $on_chips .venv_jax/bin/python -m "$program" "$@"
  exit
fi

# TensorFlow reaches the chips of newer generations through PJRT only.
type=$(metadata accelerator-type)
case $type in
  v2-* | v3-* | v4-*) pjrt='' ;;
  *) pjrt='env NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=.venv/libtpu.so' ;;
esac
# shellcheck disable=SC2086
if [ "$hosts" = 1 ]; then
  background $once "$job" $on_chips $pjrt .venv/bin/python -m "$program" --tpu=local "$@"
else
  require_buckets "$@"
  background --once serve_tpu $pjrt .venv/bin/python -m experiments.serve_tpu
  [ "$worker" != 0 ] ||
    background $once "$job" $on_chips env TPU_LOAD_LIBRARY=0 .venv/bin/python -m "$program" --tpu=slice "$@"
fi
