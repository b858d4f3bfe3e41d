"""Times a step that `experiments.export` wrote, for `gpu.py`, on the device that JAX finds. Needs no TensorFlow."""

import argparse
import json
import os
import pathlib
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # diffusers_worker.py shares the GPU

import jax
import numpy as np
import timing

from diffusion_tf.interop.stablehlo import compile_for


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, help="steps in each call")
    args = parser.parse_args()
    manifest = json.loads((args.folder / "manifest.json").read_text())
    device = jax.devices()[0]
    timing.serve(
        make_call(manifest, (args.folder / manifest["program"]).read_text(), device, args.steps),
        steps_per_call=args.steps,
        peak_bytes=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
        version=jax.__version__,
        device=device.device_kind,
    )


def make_call(manifest: dict, text: str, device: jax.Device, steps: int) -> Callable[[], None]:
    """A function that takes `steps` steps, each call of the program on the results of the last.

    Args:
      manifest: the export's manifest.json.
      text: its StableHLO program.
      device: where to run it.
      steps: how many; a multiple of those that the program takes in a call.
    """
    names = [argument["name"] for argument in manifest["arguments"]]
    feeds = {names.index(r["feeds"]): i for i, r in enumerate(manifest["results"]) if "feeds" in r}
    executable = compile_for([device], text, feeds)
    random = np.random.default_rng(0)
    # The values do not matter, except that a GPU takes less time for zeros.
    first = [np.asarray(_initial(random, manifest, argument)) for argument in manifest["arguments"]]
    arguments = [jax.device_put(array, device) for array in first]
    is_weight = ["initial" in argument for argument in manifest["arguments"]]

    def call() -> None:
        for i, array in enumerate(first):
            if not is_weight[i]:
                arguments[i] = jax.device_put(array, device)
        for _ in range(steps // manifest.get("steps_per_call", 1)):
            results = executable.execute(arguments)
            for argument, result in feeds.items():
                arguments[argument] = results[result]
        jax.block_until_ready(results)

    return call


def _initial(random: np.random.Generator, manifest: dict, argument: dict) -> np.ndarray:
    shape, dtype, name = argument["shape"], argument["dtype"], argument["name"]
    if dtype == "uint8":
        return random.integers(256, size=shape).astype(dtype)
    if argument.get("initial") == "zeros" or name == "first_image":
        return np.zeros(shape, dtype)
    if name == "num_steps":
        return np.asarray(manifest["steps_per_call"], dtype)
    if name == "t":
        return np.full(shape, manifest["preset"]["num_timesteps"] - 1, dtype)
    return (random.standard_normal(shape, np.float32) * (0.02 if "initial" in argument else 1)).astype(dtype)


if __name__ == "__main__":
    main()
