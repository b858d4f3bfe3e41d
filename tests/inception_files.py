"""Small networks with Inception's signature: a SavedModel, and a frozen graph fed at `Mul`."""

import numpy as np
import tensorflow as tf

# pool_3 is 24 numbers in place of 2,048, logits 8 in place of 1,008.
_RNG = np.random.RandomState(0)
POOL = _RNG.standard_normal((27, 24)).astype(np.float32)
LOGITS = _RNG.standard_normal((24, 8)).astype(np.float32)


def classify(images):
    """float32 [B, 299, 299, 3] to `pool_3` [B, 1, 1, 24] and `logits` [B, 8]."""
    pooled = tf.nn.avg_pool2d(images, 99, 99, "VALID")
    features = tf.nn.relu(tf.reshape(pooled, [-1, 27]) @ POOL)
    pool_3 = tf.reshape(features, [-1, 1, 1, 24], name="pool_3")
    return {"pool_3": pool_3, "logits": tf.matmul(features, LOGITS, name="logits")}


def save_model(path, outputs=("pool_3", "logits")):
    """As TF-GAN's: a callable object that returns a dictionary."""

    class Inception(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 299, 299, 3], tf.float32)])
        def __call__(self, images):
            return {name: value for name, value in classify(images).items() if name in outputs}

    tf.saved_model.save(Inception(), str(path))


def save_frozen_graph(path):
    """As the published file of 2015: `Mul` is behind decoding and resizing, which a feed replaces."""
    with tf.Graph().as_default() as graph:
        raw = tf.compat.v1.placeholder(tf.float32, [None, 299, 299, 3], name="ExpandDims")
        classify(tf.multiply(raw, 1.0, name="Mul"))
    path.write_bytes(graph.as_graph_def().SerializeToString())
