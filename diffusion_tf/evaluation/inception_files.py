"""Loads Inception from the forms in which people have it.

The network is that of 2015 in all of them: TensorFlow's frozen graph (`classify_image_graph_def.pb`), TF-GAN's frozen
graph and SavedModel, and pytorch-fid's weights `pt_inception-2015-12-05`, as PyTorch or safetensors have them.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.evaluation.fid_inception import fid_inception
from diffusion_tf.storage.files import read_file
from diffusion_tf.storage.safetensors_header import read_arrays, read_header
from diffusion_tf.storage.torch_files import LEGACY_MAGIC, ZIP_MAGIC, read_torch

# The published graph's product of features and weights; what follows adds the bias, and takes one image.
_LOGITS = "softmax/logits/MatMul"
Classifier = Callable[[tf.Tensor], dict[str, tf.Tensor]]


def load_inception(path: str) -> tuple[Classifier, str]:
    """Loads Inception from a SavedModel's folder, a frozen graph, or weights in PyTorch's layout.

    Args:
      path: a folder, or a file, whose contents tell what it is.

    Returns:
      The network, which maps images float32 [B, 299, 299, 3] to a dictionary with `pool_3` and `logits`, and the name
      in RESIZES of what its distributors do to images before it.

    Raises:
      InputError: a file of weights cannot be read, or holds those of another network.
      Exception: TensorFlow cannot load the graph.
    """
    if tf.io.gfile.isdir(path):
        return _load_saved_model(path), "tf1"
    data = read_file(path)
    if data.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        return fid_inception(read_torch(path), path), "pytorch_fid"
    if data.startswith(b"\x80"):
        raise DamagedFileError(
            f"{path} is a pickle, which may run code: give the tensors, as safetensors or as `torch.save` writes them"
        )
    if path.endswith(".safetensors"):
        return fid_inception(read_arrays(path, read_header(path)), path), "pytorch_fid"
    return _load_frozen_graph(data), "tf1"


def _load_saved_model(path: str) -> Classifier:
    model = tf.saved_model.load(path)
    if callable(model):
        return model
    signature = model.signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    return lambda images: signature(**{name: images})


def _load_frozen_graph(data: bytes) -> Classifier:
    graph_def = tf.compat.v1.GraphDef()
    try:
        graph_def.ParseFromString(data)
    except Exception as error:  # protobuf's own DecodeError, which has no public name
        raise ValueError("not a frozen graph") from error
    for node in graph_def.node:
        if node.op == "BatchNormWithGlobalNormalization":
            _modernise_batch_norm(node, graph_def)
    nodes = {node.name: node for node in graph_def.node}
    # The published graph decodes and resizes before `Mul`; feeding `Mul` skips both.
    inputs = ["Mul"] if "Mul" in nodes else [name for name, node in nodes.items() if node.op == "Placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"the graph has {len(inputs)} inputs, not one")
    names = [name for name in ("pool_3", "logits") if name in nodes]
    fetched = [f"{name}:0" for name in names]
    if _LOGITS in nodes and "logits" not in nodes:
        fetched.append(_tensor_name(nodes[_LOGITS].input[1]))

    def import_graph(images: tf.Tensor) -> list[tf.Tensor]:
        """A graph that was made for one image takes any number by this input."""
        return tf.graph_util.import_graph_def(graph_def, {f"{inputs[0]}:0": images}, fetched, name="")

    wrapped = tf.compat.v1.wrap_function(import_graph, [tf.TensorSpec([None, 299, 299, 3], tf.float32)])
    pruned = wrapped.prune(wrapped.inputs, wrapped.outputs)

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = pruned(images)
        named = dict(zip(names, outputs, strict=False))
        if len(outputs) > len(names):
            weights = outputs[-1]
            named["logits"] = tf.reshape(named["pool_3"], [-1, weights.shape[0]]) @ weights
        return named

    return classify


def _tensor_name(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _modernise_batch_norm(node: Any, graph_def: tf.compat.v1.GraphDef) -> None:
    """Replaces the batch norm of 2015 graphs, which TensorFlow 2 does not run, by its successor."""
    x, mean, variance, beta, gamma = node.input
    epsilon, dtype = node.attr["variance_epsilon"].f, node.attr["T"].type
    if not node.attr["scale_after_normalization"].b:
        ones = graph_def.node.add(name=f"{node.name}/ones", op="OnesLike", input=[variance])
        ones.attr["T"].type = dtype
        gamma = ones.name
    name = node.name
    node.Clear()
    node.name, node.op = name, "FusedBatchNormV3"
    node.input.extend([x, gamma, beta, mean, variance])
    node.attr["T"].type = node.attr["U"].type = dtype
    node.attr["epsilon"].f = epsilon
    node.attr["is_training"].b = False
    node.attr["data_format"].s = b"NHWC"
