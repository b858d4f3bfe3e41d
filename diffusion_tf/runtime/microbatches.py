"""Splits a batch on a CPU into microbatches: larger ones are no faster, and their feature maps take memory."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from diffusion_tf.ops import backend
from diffusion_tf.runtime.replicas import pad_batch


def map_microbatches(
    function: Callable, arrays: Sequence[tf.Tensor], *, max_size: int, zeros: Callable[[], Any] | None = None
) -> Any:
    """Calls `function(first, *microbatch)` for consecutive microbatches, and concatenates or sums the results.

    `first` is the index of the microbatch's first example in the batch. Only a CPU graph splits the batch; elsewhere,
    and if the batch is small, this is `function(0, *arrays)`.

    Args:
      function: its results are a structure of tensors; float32 [B, ...] if they are concatenated.
      arrays: [B, ...] each, B static.
      max_size: the most examples of a microbatch.
      zeros: None concatenates the results of equal microbatches, the last one padded with zeros. Otherwise it makes a
        structure of zeros like the result, to which the results are added. Then no microbatch is padded, so a batch
        without a divisor in (max_size / 2, max_size] stays whole.
    """
    batch = arrays[0].shape[0]
    current = backend.current()
    if not current.cpu_graph:
        return function(0, *arrays)
    if current.compiles_network:
        return _one_program(lambda: function(0, *arrays))
    if zeros is not None:
        return _sum(function, arrays, max_size, zeros)
    if batch <= max_size:
        return function(0, *arrays)
    count = -(-batch // max_size)
    size = -(-batch // count)
    microbatches = [tf.reshape(pad_batch(a, count * size), [count, size, *a.shape[1:]]) for a in arrays]
    results = tf.map_fn(
        lambda inputs: function(inputs[0], *inputs[1:]),
        (tf.range(0, count * size, size), *microbatches),
        parallel_iterations=1,
        fn_output_signature=tf.float32,
    )
    return tf.nest.map_structure(lambda y: tf.reshape(y, [count * size, *y.shape[2:]])[:batch], results)


def _sum(function: Callable, arrays: Sequence[tf.Tensor], max_size: int, zeros: Callable[[], Any]) -> Any:
    batch = arrays[0].shape[0]
    size = next((size for size in range(max_size, max_size // 2, -1) if batch % size == 0), batch)
    if size == batch:
        return function(0, *arrays)

    def add(i: tf.Tensor, total: Any) -> tuple[tf.Tensor, Any]:
        microbatch = [tf.reshape(a, [-1, size, *a.shape[1:]])[i] for a in arrays]
        return i + 1, tf.nest.map_structure(tf.add, total, function(i * size, *microbatch))

    # One after the other: in parallel, all would keep their feature maps at the same time.
    return tf.while_loop(lambda i, _: i < batch // size, add, (0, zeros()), parallel_iterations=1)[1]


def _one_program(function: Callable) -> Any:
    """The result of `function()`, which may read tensors of its closure, computed by one XLA program."""

    def program() -> Any:
        with backend.entered(backend.XLA):
            return function()

    return tf.function(program, jit_compile=True, autograph=False)()
