"""Eight logical CPU devices for all tests: replicas need them, and TensorFlow fixes their number at its start."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the tests' time is compilation: XLA's programs stay the same, LLVM spends less on them. (They run slower, so
# `make test-slow`, which trains for minutes, sets this to nothing.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# The client of gs:// retries at once, and reads 1 MiB where it would read 64.
os.environ.setdefault("GCS_RETRY_CONFIG_INIT_DELAY_TIME_US", "0")
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")  # the tolerances are float32's; a GPU may round to TF32
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 8)
