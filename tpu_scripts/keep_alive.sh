# Functions of train.sh --keep_alive, which sources this file after common.sh.
# shellcheck shell=sh source-path=SCRIPTDIR source=common.sh disable=SC2154 # name and dry_run are of common.sh

# Reads the state of the slice, GONE if there is none, and as long as there is one, how it was created.
look() {
  fields='name.basename(),state,acceleratorType,runtimeVersion,schedulingConfig.spot,queuedResource.basename()'
  slices=$(tpus tpu-vm list --format="csv[no-heading]($fields)") || return
  slice=$(printf '%s\n' "$slices" | awk -F , -v name="$name" '$1 == name')
  state=GONE
  [ -z "$slice" ] || IFS=, read -r _ state type version spot queued <<END
$slice
END
}

# Trains on from the newest checkpoint, after setting up a slice that is new. A training that runs already goes on.
train_on() {
  [ -z "$fresh" ] || sibling setup || return
  fresh=''
  start_on_chips --once train train "$@" || return
  started=yes
}

# Ends this script if the training has ended, and starts it again if it was interrupted.
check_training() {
  job=$(on_workers 0 'sh diffusion_tf/tpu_scripts/jobs.sh train') || return 0
  case $job in
    *' is running, '*) ;;
    *' ended with 0')
      echo "The training on $name has ended. The slice is still there: sh tpu_scripts/delete.sh --name=$name"
      exit
      ;;
    *' ended with 75' | *' ended without an exit code' | *' no job has been started')
      echo "The training on $name was interrupted."
      started=''
      ;;
    *)
      # A slice that is being preempted may kill the training before its state changes.
      sleep 60
      look && [ "$state" = READY ] || return 0
      die "the training on $name ended with code ${job##* }: sh tpu_scripts/logs.sh --name=$name --job=train"
      ;;
  esac
}

# Whether a slice that does not exist is still being waited for in the queue.
is_queued() {
  [ "$state" = GONE ] && [ -n "$queued" ] || return
  case $(tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null) in
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) ;;
    *) false ;;
  esac
}

# Creates the slice again as it was.
create_again() {
  ! is_queued || return 0
  echo "$name is $state. Creating it again."
  fresh=yes started=''
  if [ "$state" != GONE ] || [ -n "$queued" ]; then
    sibling delete ${queued:+--queued} || [ "$state" = GONE ] || return 0
  fi
  case $spot in
    [Tt]rue) flag=--spot ;;
    *) flag='' ;;
  esac
  sibling create --type="$type" --version="$version" $flag ${queued:+--queued} || true
}

# Watches until the training has ended with code 0 or an error.
keep_training() {
  case " $* " in
    *' --workdir=gs://'*) ;;
    *) die "--keep_alive needs --workdir=gs://BUCKET/RUN: the disk of a preempted slice is lost" ;;
  esac
  fresh='' started=''
  if [ -n "$dry_run" ]; then
    start_on_chips --once train train "$@"
    return
  fi
  look
  [ "$state" != GONE ] || die "there is no TPU VM $name: create it with create.sh"
  [ "$state" != READY ] || train_on "$@"
  while :; do
    case $state in
      READY)
        if [ -n "$started" ]; then
          check_training
        else
          train_on "$@" || true
        fi
        ;;
      PREEMPTED | TERMINATED | GONE) create_again ;;
    esac
    sleep 60
    look || state=UNKNOWN
  done
}
