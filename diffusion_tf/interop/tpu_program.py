"""The programs that a TPUStrategy sends to TPUs, traced and lowered to StableHLO without a TPU.

`TPUStrategy.run` marks the operations that a TPU computes; TensorFlow compiles them when the function around them runs.
`TracingStrategy` is a TPUStrategy up to that point. What it traces is lowered by the kernels for TPUs if TensorFlow is
`tensorflow-tpu`. Otherwise the kernels for CPUs lower it, and XlaAllReduce takes the place of CrossReplicaSum, which
they lack.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.handle_data_util import get_resource_handle_data
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

from diffusion_tf.errors import ConfigError
from diffusion_tf.interop.tpu_compiler import Lowered
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.strategies import tensorflow_packages
from diffusion_tf.samplers import Sampler
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.trainer import Trainer

_TRACED_REPLICAS = 2  # the fewest with an all-reduce: each holds a copy of the weights on this machine
_REPLICAS = "all_replicas"  # the group of replicas, in a program's graph


class _Device:
    def __init__(self, index: int):
        self.name = f"/job:localhost/replica:0/task:0/device:TPU:{index}"


class _Resolver(tf.distribute.cluster_resolver.ClusterResolver):
    """Describes a TPU that need not exist: soft placement puts its variables on the CPU."""

    def __init__(self, num_replicas: int):
        devices = [_Device(index) for index in range(num_replicas)]
        self._metadata = TPUSystemMetadata(num_replicas, 1, num_replicas, None, devices)

    def get_tpu_system_metadata(self) -> TPUSystemMetadata:
        return self._metadata

    def cluster_spec(self) -> tf.train.ClusterSpec:
        return tf.train.ClusterSpec({})

    def master(self, *_: Any) -> str:
        return ""


class TracingStrategy(tf.distribute.TPUStrategy):
    """A TPUStrategy without a TPU: `run` traces the replicas' program, keeps it, and returns zeros, or True, for it.

    Args:
      num_replicas: the number of replicas.

    Attributes:
      programs: the graph of each call of `run` that was traced, in their order.
    """

    def __init__(self, num_replicas: int = _TRACED_REPLICAS):
        super().__init__(_Resolver(num_replicas))
        self.programs: list[FuncGraph] = []

    def run(self, fn: Callable, args: Any = (), kwargs: Any = None, options: Any = None) -> Any:
        """As the strategy's, for `fn` whose results are tensors of static shape."""
        graph = FuncGraph("program")
        with graph.as_default():
            results = super().run(fn, args, kwargs, options)
        self.programs.append(graph)
        return tf.nest.map_structure(
            lambda x: tf.ones(x.shape, x.dtype) if x.dtype == tf.bool else tf.zeros(x.shape, x.dtype),
            results,
            expand_composites=True,
        )


class Function(NamedTuple):
    """A program as a function of tensors.

    Attributes:
      call: the function.
      arguments: what it takes, as tensors of the program: its inputs, then the variables that it uses.
      in_place: index of a variable that it assigns to the index of the result that is the new value.
    """

    call: Callable[..., list[tf.Tensor]]
    arguments: list[tf.Tensor]
    in_place: dict[int, int]


def as_function(program: FuncGraph, num_replicas: int) -> Function:
    """Returns a program of `TracingStrategy` as a function that has no side effects.

    Its results are those of the replica, and then the new values of the variables.

    Args:
      program: the graph.
      num_replicas: the number of devices that sum over their replicas.
    """
    inside = [op for op in program.get_operations() if in_program(op)]
    names = {op.name for op in inside}
    inputs = list({x.ref(): x for op in inside for x in op.inputs if x.op.name not in names}.values())
    variables = [x for x in inputs if x.dtype == tf.resource]
    arguments = [x for x in inputs if x.dtype != tf.resource] + variables
    outputs = [op.inputs[0].name for op in program.get_operations() if op.type == "TPUReplicatedOutput"]
    graph, values = _without_variables(program, names, [x.name for x in variables])
    replicas = graph.node.add(name=_REPLICAS, op="Const")
    replicas.attr["dtype"].type = tf.int32.as_datatype_enum
    replicas.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([list(range(num_replicas))]))
    assigned = [x.name for x in variables if values[x.name] != x.name]
    results = [*outputs, *(values[name] for name in assigned)]

    def call(*tensors: tf.Tensor) -> list[tf.Tensor]:
        fed = {x.name: tensor for x, tensor in zip(arguments, tensors, strict=True)}
        return tf.graph_util.import_graph_def(graph, fed, results, name="")

    places = [x.name for x in arguments]
    return Function(call, arguments, {places.index(name): len(outputs) + i for i, name in enumerate(assigned)})


def to_stablehlo(program: FuncGraph, num_replicas: int) -> Lowered:
    """Lowers a program of `TracingStrategy` for one of `num_replicas` devices."""
    function = as_function(program, num_replicas)
    platform = "TPU" if "tensorflow-tpu" in tensorflow_packages() else "CPU"
    compiled = tf.function(function.call, jit_compile=True, autograph=False)
    specs = map(_spec, function.arguments)
    text = compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo", platform_name=platform)
    return Lowered(text, function.in_place, kernels=platform)


def in_program(op: tf.Operation) -> bool:
    """Whether a TPU computes the operation of a program's graph; the host computes the others."""
    return op.type != "TPUReplicateMetadata" and "_tpu_replicate" in op.node_def.attr


def _spec(x: tf.Tensor) -> tf.TensorSpec:
    """Returns shape and dtype of a tensor, or of a variable's value."""
    if x.dtype != tf.resource:
        return tf.TensorSpec(x.shape, x.dtype)
    value = get_resource_handle_data(x.op.inputs[0]).shape_and_type[0]
    return tf.TensorSpec([dim.size for dim in value.shape.dim], value.dtype)


def _without_variables(
    program: FuncGraph, names: set[str], variables: list[str]
) -> tuple[tf.compat.v1.GraphDef, dict[str, str]]:
    """Returns the operations called `names` as a graph without side effects, and the last value of each variable.

    Tracing creates operations in the order in which they take effect, so a variable's value is that of its last
    assignment before.
    """
    traced, graph = program.as_graph_def(), tf.compat.v1.GraphDef()
    graph.versions.CopyFrom(traced.versions)
    graph.library.CopyFrom(traced.library)
    values = {name: name for name in variables}
    for original in traced.node:
        if original.name not in names:
            continue
        inputs = [name for name in original.input if not name.startswith("^")]
        if original.op == "AssignVariableOp":
            values[_tensor(inputs[0])] = _tensor(inputs[1])
            continue
        node = graph.node.add(name=original.name, op=original.op, input=inputs)
        for key, value in original.attr.items():
            if not key.startswith("_"):
                node.attr[key].CopyFrom(value)
        if original.op == "ReadVariableOp":
            _become_identity(node, values[_tensor(inputs[0])])
        elif original.op == "CrossReplicaSum":
            _sum_over_all(node)
    return graph, values


def _tensor(name: str) -> str:
    """Returns the full name of a tensor, which a graph shortens."""
    return name if ":" in name else f"{name}:0"


def _become_identity(node: Any, value: str) -> None:
    dtype = node.attr["dtype"].type
    node.op, node.input[:] = "Identity", [value]
    node.attr.clear()
    node.attr["T"].type = dtype


def _sum_over_all(node: Any) -> None:
    node.input[1] = _REPLICAS
    if "tensorflow-tpu" not in tensorflow_packages():
        node.op = "XlaAllReduce"
        node.attr["reduce_op"].s, node.attr["mode"].s = b"Add", b"CrossReplica"


def train_step(preset: Preset, num_replicas: int) -> Lowered:
    """Lowers what `Trainer.run_steps` starts for each training step, on a device with `preset.batch_size` images."""
    strategy = TracingStrategy()
    trainer = Trainer(_of_all(preset, strategy), strategy)
    shape = (preset.batch_size, *preset.image_shape)
    examples = (tf.zeros(shape, tf.uint8), tf.zeros(shape[:1], tf.int32))[: 2 if preset.num_classes else 1]
    batch = examples if preset.num_classes else examples[0]
    source = strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.from_tensors(batch).repeat())
    trainer.run_steps(iter(source), tf.constant(1))
    return to_stablehlo(strategy.programs[0], num_replicas)


def sample(preset: Preset, num_replicas: int) -> Lowered:
    """Lowers what `Sampler` starts for each of the calls that draw a batch, `preset.batch_size` images on a device."""
    strategy = TracingStrategy()
    preset = _of_all(preset, strategy)
    sampler = Sampler(TrainedModel(preset, strategy), batch_size=preset.batch_size, seed=preset.seed)
    sampler(0)
    noise_and_steps = strategy.programs
    lowered = to_stablehlo(noise_and_steps[-1], num_replicas)
    return dataclasses.replace(
        lowered, num_steps=sampler.steps_per_call, calls=-(-sampler.num_steps // sampler.steps_per_call)
    )


def _of_all(preset: Preset, strategy: tf.distribute.Strategy) -> Preset:
    """Returns the preset for all replicas, given that for one."""
    return dataclasses.replace(preset, batch_size=preset.batch_size * strategy.num_replicas_in_sync)


def _worker() -> None:
    """Reads a request of `tpu_compiler.lower` from stdin and prints the answer as one line of JSON."""
    request = json.load(sys.stdin)
    program = {"train_step": train_step, "sample": sample}[request["what"]]
    try:
        answer: Any = dataclasses.asdict(program(Preset(**request["preset"]), request["num_replicas"]))
    except ConfigError as error:
        _, answer = error.__reduce__()  # what makes the same error in the other process
    print(json.dumps(answer))


if __name__ == "__main__":
    _worker()
