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

name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT:-} dry_run='' pjrt=''

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

# start_job JOB WORD...: starts a command in the VM's checkout that keeps running after the connection ends (see
# background.sh).
start_job() {
  job=$1
  shift
  [ -z "$pjrt" ] ||
    set -- env NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=.venv/libtpu.so "$@"
  tpus tpu-vm ssh "$name" --worker=0 --command="sh diffusion_tf/tpu_scripts/background.sh $(quote "$job" "$@")"
  suggest "Started. To follow its output:" tpu-vm ssh "$name" --worker=0 --command="tail -F diffusion_tf/$job.log"
  suggest "To stop it:" tpu-vm ssh "$name" --worker=0 --command="kill \$(cat diffusion_tf/$job.pid)"
}
