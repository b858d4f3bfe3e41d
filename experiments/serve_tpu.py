"""Serves the chips of this worker of a TPU slice to the process that trains on worker 0.

  python -m experiments.serve_tpu                                               on every worker, worker 0 too
  python -m experiments.train --tpu=slice --workdir=gs://BUCKET/RUN ...         on worker 0

TensorFlow's server listens at --port for worker 0. The next port tells worker 0 whether Compute Engine, or a SIGTERM,
is about to end this machine: it answers /computeMetadata/v1/instance/preempted as the metadata server does. libtpu
learns its place in the slice from the metadata server: GCE_METADATA_HOST names another one.

The program runs until a signal. After SIGTERM or SIGHUP it goes on for up to 25 s if a process trains, which saves
meanwhile. Anyone who reaches the ports can run programs here: keep them inside the slice's network.

A rehearsal needs no TPU. Start two servers, then train on the virtual replica of each:

  python -m experiments.serve_tpu --virtual_cpus=2 --port=8470
  python -m experiments.serve_tpu --virtual_cpus=2 --port=8480
  python -m experiments.train --tpu=grpc://127.0.0.1:8470,127.0.0.1:8480 --workdir=runs/rehearsal
"""

import os
import signal

from absl import flags

from diffusion_tf import tpu_attached
from diffusion_tf.errors import ConfigError, PreemptedError
from diffusion_tf.runtime.slices import PORT
from diffusion_tf.runtime.tpu_server import NoticeServer, start_server, tpu_environment

from . import _program

FLAGS = flags.FLAGS
flags.DEFINE_integer("port", PORT, "Where to serve; the next port tells the notices.", 1, 2**16 - 2)
flags.DEFINE_integer(
    "virtual_cpus",
    None,
    "For rehearsals without a TPU: serve this many virtual CPUs, the first as the host and the others as replicas.",
    2,
    257,
)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _check() -> None:
    """Checks the flags, and sets the environment that TensorFlow's import reads."""
    if FLAGS.virtual_cpus:
        os.environ["TPU_LOAD_LIBRARY"] = "0"
    elif not tpu_attached():
        raise ConfigError("virtual_cpus", "is required where there is no TPU (no /dev/accel0, no /dev/vfio/0)")
    else:
        os.environ.update(tpu_environment())
    # Not for a handler: TensorFlow's coordination service sets its own, and SIGTERM would do nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # A worker reads its records here and there, and TensorFlow reads blocks of 64 MB from a bucket unless told.
    os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")


_program.parse_flags(__name__, _check)

import time

from diffusion_tf.training.preemption import PreemptionNotice

_GRACE_SECONDS, _RECENTLY = 25.0, 10.0


def main() -> None:
    ends: list[int] = []  # the signal that ends this program
    server = start_server(FLAGS.port, FLAGS.virtual_cpus)
    with (
        PreemptionNotice(signals=()) as notice,
        NoticeServer(FLAGS.port + 1, lambda: bool(ends) or notice.reason is not None) as told,
    ):
        print(f"serving at port {FLAGS.port}, notices at port {FLAGS.port + 1}", flush=True)
        ends.append(signal.sigwait(_SIGNALS))
        if told.last_asked and time.monotonic() - told.last_asked < _RECENTLY:
            signal.sigtimedwait(_SIGNALS, _GRACE_SECONDS)
    del server
    raise PreemptedError(f"{signal.Signals(ends[0]).name}: this worker serves no longer")


if __name__ == "__main__":
    _program.run(main)
