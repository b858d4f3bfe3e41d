"""An exported train_loop on a device of JAX: the program and the state of training. Needs no TensorFlow."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np

from diffusion_tf.errors import InputError
from diffusion_tf.interop import stablehlo
from diffusion_tf.presets import Preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.checkpoints import check_specs
from diffusion_tf.storage.files import Arrays, first_line, read_file
from diffusion_tf.storage.json_files import read_json
from diffusion_tf.storage.safetensors_header import ArraySpec, read_arrays, read_header

_STEP_DTYPE = {"int32": "int64"}  # of a program, since TPUs have no 64-bit integers, to that of a checkpoint


class _Array(TypedDict):
    """An argument or a result of the program."""

    name: str
    shape: list[int]
    dtype: str
    initial: NotRequired[str]


class _Manifest(TypedDict):
    """`manifest.json` of an export, as far as training reads it."""

    what: str
    program: str
    weights: str
    preset: dict[str, Any]
    arguments: list[_Array]
    results: list[_Array]
    steps_per_call: NotRequired[int]
    init_from: NotRequired[dict[str, str] | None]


class TrainLoop:
    """An exported train_loop and, after `start` or `restore`, the state of training.

    Args:
      folder: what `export --what=train_loop` wrote.

    Attributes:
      preset: the recipe of the export.
      steps_per_call: the most steps of a call.
      init_from: `path` and `sha256` of the checkpoint whose weights the export holds; None: they are initial ones.

    Raises:
      InputError: the folder holds no train_loop, a file is damaged, or JAX is not installed.
    """

    def __init__(self, folder: str):
        if not importlib.util.find_spec("jax"):
            raise InputError("training from an export needs JAX: pip install '.[jax_gpu]'")
        path = os.path.join(folder, "manifest.json")
        manifest: _Manifest = read_json(path, _Manifest)
        self.steps_per_call = manifest.get("steps_per_call", 0)
        if manifest["what"] != "train_loop" or self.steps_per_call < 1:
            raise InputError(f"{folder} holds the program {manifest['what']}: write one by `export --what=train_loop`")
        try:
            self.preset = Preset(**manifest["preset"])
        except (InputError, TypeError) as error:
            raise InputError(f"{path} is not an export of this version ({first_line(error)})") from error
        self.init_from = manifest.get("init_from")
        self._text = read_file(os.path.join(folder, manifest["program"])).decode()
        self._weights = os.path.join(folder, manifest["weights"])
        self._arguments = {array["name"]: array for array in manifest["arguments"]}
        self._results = [array["name"] for array in manifest["results"]]
        self._initial = {name: array["initial"] for name, array in self._arguments.items() if "initial" in array}
        self._state: dict[str, Any] = {}

    def compile(self) -> str:
        """Compiles the program for the first device of JAX, which takes up to minutes, and returns its name.

        Raises:
          InputError: the memory of the device is too small.
        """
        import jax

        self._device = jax.devices()[0]
        in_place = {
            place: self._results.index(name) for place, name in enumerate(self._arguments) if name in self._initial
        }
        with memory_errors():
            self._executable = stablehlo.compile_for(self._device, self._text, in_place)
        return self._device.device_kind

    def start(self) -> None:
        """Starts from the export's weights.

        Raises:
          InputError: their file is damaged, or does not hold them.
        """
        weights = read_arrays(self._weights, read_header(self._weights))
        wanted = {initial: name for name, initial in self._initial.items() if name.startswith("params/")}
        check_specs(_specs(weights), {key: self._spec(name) for key, name in wanted.items()}, self._weights)
        self._assign(
            {
                name: weights[key] if key in weights else np.zeros(self._arguments[name]["shape"], np.float32)
                for name, key in self._initial.items()
            }
        )

    def restore(self, path: str) -> None:
        """Restores the state from the checkpoint at `path`; if it does not fit, nothing changes.

        Raises:
          InputError: the file is damaged, or its names, shapes or dtypes are not this state's.
        """
        wanted = {name: self._spec(name) for name in self._initial}
        arrays = checkpoints.load(path, sum(spec.num_bytes for spec in wanted.values()))
        check_specs(_specs(arrays), wanted, path)
        self._assign(arrays)

    @property
    def step(self) -> int:
        """Training steps taken."""
        return int(self._state["step"])

    def to_arrays(self) -> Arrays:
        """Returns the state by the names and dtypes of a checkpoint."""
        # Copies: on a CPU, the arrays may be the memory that the next call overwrites.
        return {name: np.array(value, self._spec(name).dtype) for name, value in self._state.items()}

    def put(self, **examples: np.ndarray) -> dict[str, Any]:
        """Sends the arguments `images` and, with classes, `labels` of a call to the device, and does not wait."""
        import jax

        return {name: jax.device_put(array, self._device) for name, array in examples.items()}

    def run_steps(self, num_steps: int, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Starts a call of `num_steps` training steps on what `put` returned, and does not wait for its end.

        Returns:
          `loss` and `grad_norm` of each step, float32 [steps_per_call] with zeros from `num_steps` on, and `param_norm`
          of the weights after them, as arrays on the device.
        """
        values = {**self._state, **examples, **self.put(num_steps=np.asarray(num_steps, np.int32))}
        outputs = self._executable.execute([values[name] for name in self._arguments])
        results = dict(zip(self._results, outputs, strict=True))
        self._state = {name: results.pop(name) for name in self._state}
        return results

    def _spec(self, name: str) -> ArraySpec:
        """The dtype and shape of an array of the state in a checkpoint."""
        array = self._arguments[name]
        return ArraySpec(_STEP_DTYPE.get(array["dtype"], array["dtype"]), tuple(array["shape"]))

    def _assign(self, arrays: Mapping[str, np.ndarray]) -> None:
        # Copies: a call overwrites what it is given, and two arguments may start with the same weights.
        self._state = self.put(
            **{name: np.array(arrays[name], self._arguments[name]["dtype"]) for name in self._initial}
        )


def _specs(arrays: Arrays) -> dict[str, ArraySpec]:
    return {name: ArraySpec(array.dtype.name, array.shape) for name, array in arrays.items()}


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raises InputError if the block exhausts the device's memory."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "out of memory: export with a smaller `per_replica_batch`, or fewer `steps_per_call`"
        ) from error
