"""An exported train_loop on the devices of JAX: the program and the state of training. Needs no TensorFlow."""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
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
    replicas: NotRequired[int]
    init_from: NotRequired[dict[str, str] | None]


class TrainLoop:
    """An exported train_loop and, after `start` or `restore`, the state of training.

    Args:
      folder: what `export --what=train_loop` wrote.

    Attributes:
      preset: the recipe of the export.
      steps_per_call: the most steps of a call.
      replicas: the number of devices, each of which computes an equal share of the batch.
      shares: which of these shares this process computes, after `compile`.
      text_sha256: the SHA-256 of the program.
      init_from: `path` and `sha256` of the checkpoint whose weights the export holds; None: they are initial ones.

    Raises:
      InputError: the folder holds no train_loop, a file is damaged, or JAX is not installed.
    """

    def __init__(self, folder: str):
        if not importlib.util.find_spec("jax"):
            raise InputError("training from an export needs JAX: pip install '.[jax-gpu]', on a TPU VM '.[jax-tpu]'")
        path = os.path.join(folder, "manifest.json")
        manifest: _Manifest = read_json(path, _Manifest)
        self.steps_per_call = manifest.get("steps_per_call", 0)
        if manifest["what"] != "train_loop" or self.steps_per_call < 1:
            raise InputError(f"{folder} holds the program {manifest['what']}: write one by `export --what=train_loop`")
        try:
            self.preset = Preset(**manifest["preset"])
        except (InputError, TypeError) as error:
            raise InputError(f"{path} is not an export of this version ({first_line(error)})") from error
        self.replicas = manifest.get("replicas", 1)
        self.shares = range(self.replicas)
        self.init_from = manifest.get("init_from")
        text = read_file(os.path.join(folder, manifest["program"]))
        self._text, self.text_sha256 = text.decode(), hashlib.sha256(text).hexdigest()
        self._weights = os.path.join(folder, manifest["weights"])
        self._arguments = {array["name"]: array for array in manifest["arguments"]}
        self._results = {array["name"]: tuple(array["shape"]) for array in manifest["results"]}
        self._initial = {name: array["initial"] for name, array in self._arguments.items() if "initial" in array}
        self._state: dict[str, Any] = {}

    def compile(self) -> str:
        """Compiles the program, which takes up to minutes, and returns the name of the devices.

        Raises:
          InputError: there are too few devices, or the memory of a device is too small.
        """
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        # Those of a process are neighbours, as the shares of the batch that it reads are.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        if len(devices) < self.replicas or (jax.process_count() > 1 and len(devices) > self.replicas):
            raise InputError(
                f"the export is for {self.replicas} devices, and there are {len(devices)}:"
                f" export with `replicas={len(devices)}`"
            )
        devices = devices[: self.replicas]
        mine = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
        self.shares = range(mine[0], mine[-1] + 1)
        mesh = Mesh(np.array(devices), ("replica",))
        self._on_all = NamedSharding(mesh, PartitionSpec())
        self._shared = NamedSharding(mesh, PartitionSpec(None, "replica"))
        results = list(self._results)
        in_place = {place: results.index(name) for place, name in enumerate(self._arguments) if name in self._initial}
        with memory_errors():
            self._executable = stablehlo.compile_for(devices, self._text, in_place)
        return f"{self.replicas} x {devices[0].device_kind}" if self.replicas > 1 else devices[0].device_kind

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

    def share_state(self, from_chief: Callable[[Arrays], Arrays]) -> None:
        """Takes over the state of the chief of several processes, which `from_chief` returns for that of each."""
        arrays = {name: self._arguments[name] for name in self._initial}
        state = {
            name: np.asarray(_local(self._state[name])) if self._state else np.zeros(array["shape"], array["dtype"])
            for name, array in arrays.items()
        }
        self._assign(from_chief(state))

    @property
    def step(self) -> int:
        """Training steps taken."""
        return int(_local(self._state["step"]))

    def to_arrays(self) -> Arrays:
        """Returns the state by the names and dtypes of a checkpoint."""
        # Copies: on a CPU, the arrays may be the memory that the next call overwrites.
        return {name: np.array(_local(value), self._spec(name).dtype) for name, value in self._state.items()}

    def put(self, **examples: np.ndarray) -> dict[str, Any]:
        """Sends the arguments `images` and, with classes, `labels` of a call to the devices, and does not wait.

        Each holds the examples of this process: [steps_per_call, `len(shares)` equal shares of the batch, ...].
        """
        return {name: self._send(self._shared, array) for name, array in examples.items()}

    def run_steps(self, num_steps: int, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Starts a call of `num_steps` training steps on what `put` returned, and does not wait for its end.

        Returns:
          `loss` and `grad_norm` of each step, float32 [steps_per_call] with zeros from `num_steps` on, and `param_norm`
          of the weights after them, as arrays on a device.
        """
        steps = self._send(self._on_all, np.asarray(num_steps, np.int32))
        values = {**self._state, **examples, "num_steps": steps}
        arguments = [values[name] for name in self._arguments]
        outputs = stablehlo.call(self._executable, arguments, list(self._results.values()), self._on_all)
        results = dict(zip(self._results, outputs, strict=True))
        self._state = {name: results.pop(name) for name in self._state}
        return {name: _local(value) for name, value in results.items()}

    def _send(self, sharding: Any, array: np.ndarray) -> Any:
        """Sends the part of an array that this process has."""
        import jax

        return jax.make_array_from_process_local_data(sharding, array)

    def _spec(self, name: str) -> ArraySpec:
        """The dtype and shape of an array of the state in a checkpoint."""
        array = self._arguments[name]
        return ArraySpec(_STEP_DTYPE.get(array["dtype"], array["dtype"]), tuple(array["shape"]))

    def _assign(self, arrays: Mapping[str, np.ndarray]) -> None:
        import jax

        def on_each_device(array: np.ndarray, dtype: str) -> Any:
            # Copies, as a call overwrites what it is given: on CPUs, the array would be the memory of all devices.
            copies = [jax.device_put(np.array(array, dtype), device) for device in self._on_all.addressable_devices]
            return jax.make_array_from_single_device_arrays(array.shape, self._on_all, copies)

        self._state = {name: on_each_device(arrays[name], self._arguments[name]["dtype"]) for name in self._initial}


def _local(array: Any) -> Any:
    """The copy on a device of this process of an array that is equal on all devices."""
    return array.addressable_data(0)


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
