"""Exchange with other frameworks: TF1 and diffusers weights, StableHLO, SavedModels and the TPU compiler.

The names here need no TensorFlow: flags are checked before it is imported.
"""

FORMATS = ("tf1", "diffusers")  # of weights to import
PROGRAMS = ("train_step", "sample_step", "sampler", "denoiser")  # to export
DTYPES = ("float32", "bfloat16", "float16")  # of the weights in a diffusers folder
