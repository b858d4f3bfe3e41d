"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in TensorFlow 2 and Keras 3."""

import glob
import os

__version__ = "0.1.0"


def tpu_attached() -> bool:
    """Whether this machine has a TPU's device files: /dev/accel0 and on, or those of newer TPUs, /dev/vfio/0 and on."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


# Here, since it must be before TensorFlow is imported; and not where there is a TPU. Without one, the import of
# tensorflow-tpu looks for it for minutes: TPU_LOAD_LIBRARY=1 lets it, should a TPU's files be elsewhere. A CPU's step
# then keeps its memory for the next one: malloc gives it fresh pages, and to have them zeroed is a seventh of its time.
if not tpu_attached():
    os.environ.setdefault("TPU_LOAD_LIBRARY", "0")
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "1")
    os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(2**20))  # none; it would be 64 GiB
