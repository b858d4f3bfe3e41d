"""What the kernels of tensorflow-tpu accept, from tests/fixtures/tpu_kernels.json."""

import json
import pathlib

import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework.func_graph import FuncGraph

from diffusion_tf.interop.tpu_program import in_program

_FILE = json.loads((pathlib.Path(__file__).parent.parent / "fixtures" / "tpu_kernels.json").read_text())
_TYPES = {name: set(types.split()) for name, types in _FILE["types"].items()}


def refusals(program: FuncGraph) -> set[str]:
    """What a TPU refuses in a program of TracingStrategy: operations without a kernel, calls of the host, and shapes.

    TPUs have no kernels for operations that call the host, such as those of `tf.print` and `tf.py_function`.
    """
    names = {op.name for op in program.get_operations() if in_program(op)}
    graph = program.as_graph_def(add_shapes=True)
    nodes = [node for node in graph.node if node.name in names]
    functions = {function.signature.name: function.node_def for function in graph.library.function}
    # Only what the program calls: the library may hold more.
    for node in nodes:
        for attr in node.attr.values():
            nodes.extend(functions.pop(attr.func.name, ()))
    return {f"{node.op}: {problem}" for node in nodes for problem in _problems(node)}


def _problems(node: NodeDef) -> list[str]:
    kernels = _FILE["kernels"].get(node.op)
    if kernels is None:
        return ["no kernel"]
    types = {name: _dtypes(attr) for name, attr in node.attr.items()}
    problems = []
    if not any(all(types[name] <= _TYPES[kind] for name, kind in kernel.items()) for kernel in kernels):
        problems.append(f"no kernel for {types}")
    if "_xla_outside_compilation" in node.attr:
        problems.append("calls the host")
    shapes = node.attr["_output_shapes"].list.shape
    if any(shape.unknown_rank or any(dim.size < 0 for dim in shape.dim) for shape in shapes):
        problems.append("dynamic shape")
    return problems


def _dtypes(attr: AttrValue) -> set[str]:
    types = [attr.type] if attr.HasField("type") else attr.list.type
    return {tf.as_dtype(dtype).name for dtype in types}
