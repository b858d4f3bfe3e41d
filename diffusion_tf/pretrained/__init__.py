"""Trained weights that ship with the package, one folder each: EMA weights in float16 as diffusers saves a pipeline.

What else is in such a folder, such as the codec's table, lies where a run's folder has it. README.md in this folder
says what the weights were trained on.
"""

import hashlib
import os
import shutil

from diffusion_tf.errors import InputError
from diffusion_tf.interop.diffusers import read_diffusers
from diffusion_tf.presets import PRETRAINED, get_preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import cache_folder, new_folder, read_file
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.unet import UNet

_HERE = os.path.dirname(__file__)
_PIPELINE = ("unet", "scheduler", "model_index.json")


def resolve(path: str) -> str:
    """`path`, or the run's folder of the pretrained weights of this name if nothing has this path."""
    return run_folder(path) if path in PRETRAINED and not os.path.exists(path) else path


def run_folder(name: str) -> str:
    """The folder of a run at step 0 with pretrained weights, which every program takes.

    The first call makes it in the cache, in seconds.

    Args:
      name: one of PRETRAINED.

    Raises:
      InputError: the cache cannot be written.
    """
    shipped = os.path.join(_HERE, name)
    weights = read_file(os.path.join(shipped, "unet", "diffusion_pytorch_model.safetensors"))
    folder = os.path.join(cache_folder(), "pretrained", f"{name}-{hashlib.sha256(weights).hexdigest()[:12]}")
    if Workdir(folder).holds_run():
        return folder
    preset = get_preset(name)
    try:
        with new_folder(folder) as temporary:
            shutil.copytree(shipped, temporary, ignore=shutil.ignore_patterns(*_PIPELINE), dirs_exist_ok=True)
            workdir = Workdir(temporary)
            workdir.write_config(preset, None, f"pretrained weights: {name}\n")
            arrays = read_diffusers(shipped, preset, UNet.from_preset(preset))
            # The codec's table names this checkpoint, so its digest must not depend on this machine's packages.
            checkpoints.save(workdir.checkpoints, 0, arrays, written_by={"pretrained": name})
    except InputError:
        if not Workdir(folder).holds_run():  # another process has made it meanwhile
            raise
    return folder
