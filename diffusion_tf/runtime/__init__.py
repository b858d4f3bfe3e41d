"""Where programs run: strategies, replicas, workers, microbatches.

The names here need no TensorFlow: flags are checked before it is imported.
"""

STRATEGIES = ("auto", "tpu", "mirrored", "multi_worker", "one_device")
