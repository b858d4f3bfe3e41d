"""Which implementation of the operations a program is traced with: the only context variable of the package.

`runtime` chooses a backend for each program and enters it once, while TensorFlow traces the program. The functions of
`ops` read it; no other code asks where it runs.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a program computes the operations.

    Attributes:
      tpu: a TPU's compiler sees the whole program.
      cpu_graph: the program is a TensorFlow graph on a CPU, which calls oneDNN and compiles what lies between its
        products. With neither of the two, one compiler sees the whole program, or TensorFlow runs it as it is.
      compiles_network: in a CPU graph, compile the network and its gradient as one XLA program. This is faster for
        small images, where the start of a region costs as much as its work.
      frozen_weights: nothing assigns the network's weights after the program's first call, so a CPU may keep
        reordered copies of them.
    """

    tpu: bool = False
    cpu_graph: bool = False
    compiles_network: bool = False
    frozen_weights: bool = False


XLA = Backend()
TPU = Backend(tpu=True)

_current = contextvars.ContextVar("backend", default=XLA)


def current() -> Backend:
    """The backend of the program that is being traced; XLA outside of any."""
    return _current.get()


@contextlib.contextmanager
def entered(backend: Backend) -> Iterator[None]:
    """Everything traced inside uses `backend`."""
    token = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(token)
