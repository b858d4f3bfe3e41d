"""Exchange with other frameworks: TF1 and diffusers weights, StableHLO, SavedModels and the TPU compiler.

The names here need no TensorFlow: flags are checked before it is imported.
"""

FORMATS = ("tf1", "diffusers")  # of weights to import
DTYPES = ("float32", "bfloat16", "float16")  # of the weights in a diffusers folder
PROGRAMS = ("train_step", "train_loop", "sample_step", "sampler", "denoiser")  # to export
TPU_PROGRAMS = ("train_step", "sample")  # of a TPUStrategy
STEPS_PER_CALL = 50  # of train_loop: starting it once then costs a GPU little beside the steps

# The devices that a program is exported for.
ANY_DEVICE, TPU_DEVICE = DEVICES = ("any", "tpu")
