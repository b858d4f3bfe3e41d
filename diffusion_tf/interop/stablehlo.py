"""Compiles StableHLO text by JAX, which is imported when a function is called."""

from collections.abc import Mapping, Sequence
from typing import Any


def compile_for(devices: Sequence[Any], text: str, in_place: Mapping[int, int], *, load: bool = True) -> Any:
    """Compiles a program that TensorFlow wrote.

    No public function of JAX does this, so requirements.lock pins its version; 0.7 to 0.10 have these names.

    Args:
      devices: the JAX device of each replica, in all processes; they need not exist if the program is not loaded.
      text: StableHLO with the entry point `main`.
      in_place: index of an argument to the index of the result that takes its memory, as the variables of a training
        step do. The argument cannot be used after a call.
      load: whether the program is to be called on the devices.

    Returns:
      The executable of XLA's client.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed.
    """
    import jax
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    options = xla_client.CompileOptions()
    options.num_replicas = len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id] for device in devices])  # [replicas, partitions]
    )
    device_list, client = xla_client.DeviceList(tuple(devices)), devices[0].client
    with mlir.make_ir_context():
        # TensorFlow writes this operation under its old name.
        module = ir.Module.parse(text.replace("mhlo.copy", "stablehlo.optimization_barrier"))
        _share_memory(module, in_place, ir)
        bytecode = mlir.module_to_bytecode(module)
        if load:
            return client.compile_and_load(bytecode, device_list, options)  # 0.7 takes no module
        return client.compile(bytecode if jax.__version_info__ < (0, 8) else module, device_list, options)


def call(executable: Any, arguments: Sequence[Any], shapes: Sequence[tuple[int, ...]], sharding: Any) -> list[Any]:
    """Calls a loaded program of `compile_for` on all replicas, and does not wait for its end.

    Args:
      executable: the program.
      arguments: the arguments, each an array with a shard on the device of each replica.
      shapes: the shape of each result.
      sharding: that of the results, which are equal on all replicas.

    Returns:
      The results, with a copy on the device of each replica.
    """
    import jax

    results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    return [
        jax.make_array_from_single_device_arrays(shape, sharding, copies)
        for shape, copies in zip(shapes, results, strict=True)
    ]


def _share_memory(module: Any, in_place: Mapping[int, int], ir: Any) -> None:
    """Lets results of `main` in a module of jaxlib.mlir.ir take the memory of arguments."""
    (main,) = (op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
    int32 = ir.IntegerType.get_signless(32)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.get({"tf.aliasing_output": ir.IntegerAttr.get(int32, in_place[i])} if i in in_place else {})
            for i in range(len(main.arguments))
        ]
    )
