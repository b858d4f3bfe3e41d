# Functions that the scripts of this folder share by sourcing this file.
# shellcheck shell=sh

die() {
  echo "$(basename "$0" .sh): $*" >&2
  exit 1
}

# Prints the comment at the top of the calling script as its help.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT:-} dry_run='' runner=tensorflow

# Reads one of the flags that all scripts with gcloud share.
common_flag() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help) usage && exit ;;
    *) die "unknown argument $1: see --help" ;;
  esac
}

# Checks the flag --runner=RUNNER of the scripts that have it.
check_runner() {
  case $runner in
    tensorflow | jax) ;;
    *) die "--runner=$runner: choose tensorflow or jax" ;;
  esac
}

# Checks the flags, once all are read.
require_tpu() {
  [ -n "$name" ] || die "--name is required: the name of the TPU VM"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null ||
    die "gcloud is missing: install it as https://cloud.google.com/sdk/docs/install describes"
}

# Quotes the arguments as one line that sh, here or on the VM, splits into the same arguments.
quote() {
  separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%,+-]*)
        # $() drops trailing newlines; the x protects them.
        word=$(printf '%sx' "$word" | sed "s/'/'\\\\''/g")
        word="'${word%x}'"
        ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs a command, or prints it with --dry_run.
run() {
  if [ -n "$dry_run" ]; then
    quote "$@" && echo
  else
    "$@"
  fi
}

# Calls gcloud compute tpus with --zone and --project if given; gcloud's own configuration is the default.
tpus() {
  run gcloud compute tpus "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"}
}

# Prints a gcloud command for the user to run later, after a line of text.
suggest() {
  [ -n "$dry_run" ] || {
    printf '%s\n  ' "$1"
    shift
    dry_run=yes
    tpus "$@"
    dry_run=''
  }
}

# Makes a folder for the rest of the script the current one; --dry_run needs none.
enter_temporary_folder() {
  [ -z "$dry_run" ] || return 0
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cd "$folder" || exit
}

# Runs another script of this folder on the same TPU VM.
sibling() {
  script=$1
  shift
  sh "$(dirname "$0")/$script.sh" --name="$name" ${zone:+"--zone=$zone"} ${project:+"--project=$project"} \
    ${dry_run:+--dry_run} "$@"
}

# on_workers WORKER COMMAND: runs a line of sh on a worker, or on all.
on_workers() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

# Says how to follow and to stop a job that has been started on worker 0, or by JAX on all workers.
suggest_for_job() {
  suggest "Started. To follow its output:" tpu-vm ssh "$name" --worker=0 --command="tail -F diffusion_tf/$1.log"
  [ "$runner" = jax ] && workers=all || workers=0
  suggest "To stop it:" tpu-vm ssh "$name" --worker="$workers" --command="kill \$(cat diffusion_tf/$1.pid)"
}

# start_job JOB WORD...: starts a command in the checkout of worker 0 (see background.sh).
start_job() {
  on_workers 0 "sh diffusion_tf/tpu_scripts/background.sh $(quote "$@")"
  suggest_for_job "$1"
}

# start_on_chips [FLAG...] JOB PROGRAM ARGUMENT...: starts a program on all chips of the slice (see on_chips.sh).
start_on_chips() {
  on_workers all "sh diffusion_tf/tpu_scripts/on_chips.sh $(quote "$@")" || return
  while [ "$1" != "${1#--}" ]; do
    shift
  done
  suggest_for_job "$1"
}

# Whether a job of this worker is running (see background.sh), in the checkout.
job_is_running() {
  [ ! -f "$1.rc" ] && kill -0 "$(cat "$1.pid" 2>/dev/null)" 2>/dev/null
}
