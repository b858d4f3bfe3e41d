#!/bin/sh
# Installs this checkout for a TPU: on the TPU VM (setup.sh calls this script there), or anywhere to try it out.
#
#   sh tpu_scripts/install.sh [--runner=jax] [--venv=DIR] [--python=PYTHON]
#
#   --runner=jax     JAX for TPUs instead of TensorFlow, for experiments.train_exported alone
#   --venv=DIR       the virtual environment, created if missing (default: .venv of the checkout; for JAX, whose libtpu
#                    is newer, .venv_jax)
#   --python=PYTHON  a Python 3.11 or 3.12 (default: the first on the PATH; if there is none, uv downloads 3.11)
#
# tensorflow-tpu and tensorflow overwrite each other's files, so packages that depend on tensorflow are installed
# without their dependencies.
set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

root=$(cd "$(dirname "$0")/.." && pwd)
venv='' python=''
while [ $# -gt 0 ]; do
  case $1 in
    --runner=*) runner=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --help) usage && exit ;;
    *) die "unknown argument $1: see --help" ;;
  esac
  shift
done
check_runner
if [ -z "$venv" ]; then
  [ "$runner" = jax ] && venv=$root/.venv_jax || venv=$root/.venv
fi

# Whether a Python has the right version, and ensurepip: Ubuntu's python3.11 may lack it, and venv then fails.
fits() {
  "$1" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

if [ -n "$python" ]; then
  fits "$python" || die "--python=$python is no Python 3.11 or 3.12 with ensurepip"
else
  for candidate in python3.11 python3.12 python3; do
    if fits "$candidate"; then
      python=$candidate
      break
    fi
  done
fi
if [ -x "$venv/bin/python" ]; then
  :
elif [ -n "$python" ]; then
  "$python" -m venv "$venv"
else
  python3 -m pip install --quiet --user uv ||
    die "no Python 3.11 or 3.12 on the PATH, and pip cannot install uv to download one"
  python3 -m uv venv --quiet --python=3.11 --seed "$venv"
fi

pip() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
if [ "$runner" = jax ]; then
  pip "${root}[jax-tpu]"
  # JAX_PLATFORMS=cpu: another process may use the TPU.
  JAX_PLATFORMS=cpu "$venv/bin/python" -c '
import importlib.metadata
import importlib.util
import sys

import diffusion_tf.interop.train_loop

if importlib.util.find_spec("tensorflow"):
    sys.exit("install: the environment holds TensorFlow, whose libtpu is older: delete it and install again")
names = ("jax", "libtpu")
print("install:", " with ".join(f"{name} {importlib.metadata.version(name)}" for name in names), "and no TensorFlow")
'
  exit
fi
pip "${root}[tpu]"
pip --no-deps tensorflow-gan==2.1.0 tensorflow-hub==0.16.1 tensorflow-probability==0.25.0 tf-keras==2.20.1
pip cloudpickle decorator dm-tree lmdb # for TensorFlow Probability, and lmdb for LSUN's own files
ln -sf "$("$venv/bin/python" -c 'import libtpu; print(libtpu.get_library_path())')" "$venv/libtpu.so" # for PJRT

# TPU_LOAD_LIBRARY=0: another process may use the TPU, and without a TPU TensorFlow searches for one for minutes.
TPU_LOAD_LIBRARY=0 TF_CPP_MIN_LOG_LEVEL=3 "$venv/bin/python" - <<'END'
import importlib.metadata
import sys

names = importlib.metadata.packages_distributions()["tensorflow"]
owners = sorted({name.lower().replace("_", "-") for name in names})
if owners != ["tensorflow-tpu"]:
    sys.exit(
        f"install: tensorflow is from {' and '.join(owners)}, which overwrite each other's files:"
        " delete the environment and install again"
    )
import tensorflow as tf

from diffusion_tf.evaluation.tfgan_eval import classifier_metrics

classifier_metrics()
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("tensorflow-tpu", "libtpu")]
print(f"install: import tensorflow gives {tf.__version__}, of {' with '.join(versions)}, and no other tensorflow")
END
