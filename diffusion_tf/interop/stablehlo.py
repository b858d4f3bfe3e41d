"""Compiles StableHLO text by JAX, which is imported when a function is called."""

from collections.abc import Mapping
from typing import Any


def compile_for(device: Any, text: str, in_place: Mapping[int, int], *, load: bool = True) -> Any:
    """Compiles a program that TensorFlow wrote.

    No public function of JAX does this, so requirements.lock pins its version; 0.7 to 0.10 have these names.

    Args:
      device: the JAX device, which need not exist if the program is not loaded.
      text: StableHLO with the entry point `main`.
      in_place: index of an argument to the index of the result that takes its memory, as the variables of a training
        step do. The argument cannot be used after a call.
      load: whether the program is to be called on the device.

    Returns:
      The executable of XLA's client.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    devices, options = xla_client.DeviceList((device,)), xla_client.CompileOptions()
    with mlir.make_ir_context():
        # TensorFlow writes this operation under its old name.
        module = ir.Module.parse(text.replace("mhlo.copy", "stablehlo.optimization_barrier"))
        _share_memory(module, in_place, ir)
        if not load:
            return device.client.compile(module, devices, options)
        return device.client.compile_and_load(mlir.module_to_bytecode(module), devices, options)  # 0.7 takes no module


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
