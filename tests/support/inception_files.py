"""Small networks with the signature of Inception, as a SavedModel and as a frozen graph with the input `Mul`."""

import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# pool_3 has 24 dimensions (Inception: 2,048), logits 8 (1,008).
_RNG = np.random.RandomState(0)
POOL = _RNG.standard_normal((27, 24)).astype(np.float32)
LOGITS = _RNG.standard_normal((24, 8)).astype(np.float32)


def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
    """Maps images float32 [B, 299, 299, 3] to `pool_3` [B, 1, 1, 24] and `logits` [B, 8]."""
    pooled = tf.nn.avg_pool2d(images, 99, 99, "VALID")
    features = tf.nn.relu(tf.reshape(pooled, [-1, 27]) @ POOL)
    pool_3 = tf.reshape(features, [-1, 1, 1, 24], name="pool_3")
    return {"pool_3": pool_3, "logits": tf.matmul(features, LOGITS, name="logits")}


def save_model(path: pathlib.Path, outputs: Sequence[str] = ("pool_3", "logits")) -> None:
    """Saves a callable object that returns a dictionary, as TF-GAN's SavedModel is."""

    class Inception(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 299, 299, 3], tf.float32)])
        def __call__(self, images):
            return {name: value for name, value in classify(images).items() if name in outputs}

    tf.saved_model.save(Inception(), str(path))


def save_unnamed(path: pathlib.Path) -> None:
    """Saves a network whose output has no name."""

    class Unnamed(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 299, 299, 3], tf.float32)])
        def __call__(self, images):
            return classify(images)["logits"]

    tf.saved_model.save(Unnamed(), str(path))


MOMENTS = {"mean": [0.1, 0.2, 0.3], "variance": [0.5, 1.0, 2.0], "beta": [1.0, 0.0, -1.0], "gamma": [2.0, 3.0, 0.5]}
EPSILON = 1e-3


def batch_norm(x: tf.Tensor, scale: bool) -> tf.Tensor:
    """Batch normalisation with MOMENTS; `scale` decides whether gamma applies."""
    normal = (x - MOMENTS["mean"]) / np.sqrt(np.asarray(MOMENTS["variance"], np.float32) + EPSILON)
    return tf.cast(normal * (MOMENTS["gamma"] if scale else 1.0) + MOMENTS["beta"], tf.float32)


def save_frozen_graph(
    path: pathlib.Path, outputs: Sequence[str] = ("pool_3", "logits"), batch_norm: bool = False, scale: bool = True
) -> None:
    """Saves a graph like the published one of 2015, in which `Mul` follows decoding and resizing.

    Args:
      path: the file.
      outputs: which of pool_3 and logits keep their names.
      batch_norm: normalise the input by the operation of 2015, `BatchNormWithGlobalNormalization`.
      scale: whether that applies gamma.
    """
    with tf.Graph().as_default() as graph:
        raw = tf.compat.v1.placeholder(tf.float32, [None, 299, 299, 3], name="ExpandDims")
        images = tf.multiply(raw, 1.0, name="Mul")
        for name, values in MOMENTS.items():
            tf.constant(values, tf.float32, name=name)
        classify(tf.identity(images, name="batchnorm"))
    graph_def = graph.as_graph_def()
    for node in graph_def.node:
        if batch_norm and node.name == "batchnorm":
            node.op = "BatchNormWithGlobalNormalization"
            node.input.extend(MOMENTS)
            node.attr["variance_epsilon"].f = EPSILON
            node.attr["scale_after_normalization"].b = scale
        if node.name in ("pool_3", "logits") and node.name not in outputs:
            node.name = f"renamed_{node.name}"
    path.write_bytes(graph_def.SerializeToString())


def save_classify_image(path: pathlib.Path) -> None:
    """Saves a graph like `classify_image_graph_def.pb`, which takes one JPEG and adds a bias to the logits."""
    with tf.Graph().as_default() as graph:
        jpeg = tf.constant(tf.compat.as_bytes("no picture"), name="DecodeJpeg/contents")
        decoded = tf.cast(tf.raw_ops.DecodeJpeg(contents=jpeg, channels=3, name="DecodeJpeg"), tf.float32)
        resized = tf.raw_ops.ResizeBilinear(images=tf.expand_dims(decoded, 0), size=[299, 299])
        images = tf.multiply(resized - 128.0, 1 / 128, name="Mul")
        pool_3 = classify(images)["pool_3"]
        product = tf.matmul(tf.reshape(pool_3, [1, 24]), LOGITS, name="softmax/logits/MatMul")
        tf.nn.bias_add(product, np.ones(8, np.float32), name="softmax/logits")
    graph_def = graph.as_graph_def()
    for node in graph_def.node:
        node.name = "unused" if node.name == "logits" else node.name
    path.write_bytes(graph_def.SerializeToString())
