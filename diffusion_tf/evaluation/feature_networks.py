"""The networks whose features the metrics compare: Inception, a classifier of digits, or the pixels themselves."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from diffusion_tf.data.digits import load_digit_labels, load_digits
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.evaluation.inception_files import load_inception
from diffusion_tf.runtime.replicas import over_replicas
from diffusion_tf.storage.files import Arrays, first_line, read_file

_INCEPTION_SIZE = 299
DIGITS_SHAPE = (8, 8, 1)  # (H, W, C) of the images that the digits classifier takes
_MAX_PIXELS = 4096
# How files name what RESIZES does: a reference that an older version computed has the first name.
_RESIZE_NAMES = {
    "tf1": f"TF1 bilinear to {_INCEPTION_SIZE}",
    "pytorch_fid": f"PyTorch bilinear to {_INCEPTION_SIZE}",
}
_LOCAL_COPY = (
    "give a local copy, `inception=FOLDER` of a SavedModel, or FILE of a frozen graph or of pytorch-fid's weights"
)


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network that computes features of images.

    Attributes:
      name: inception, digits or pixels.
      sha256: digest of its weights.
      resize: how it resizes images to its input size.
      apply: maps pixels float32 [B, H, W, C] in [0, 255], not rounded, to a dictionary: `features` [B, D]; `logits`
        [B, classes] if the network is a classifier; `pixels` [B, H W C] if precision and recall should use those.
    """

    name: str
    sha256: str
    resize: str
    apply: Callable[[tf.Tensor], dict[str, tf.Tensor]]


def _flatten(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [x.shape[0], -1])


def pixels_network(image_shape: tuple[int, int, int]) -> FeatureNetwork:
    """The pixels as features, scaled to [0, 1].

    Raises:
      ConfigError: there are too many pixels for a covariance matrix.
    """
    if math.prod(image_shape) > _MAX_PIXELS:
        raise ConfigError(
            "features", f"=pixels is for small images, not {image_shape}: their covariance would fill memory"
        )
    return FeatureNetwork("pixels", "none", "none", lambda pixels: {"features": _flatten(pixels) / 255.0})


def digits_network() -> FeatureNetwork:
    """Trains a perceptron on the training split of the digits, in seconds; its hidden layer gives the features."""
    import sklearn.neural_network  # slow to import, and only digits need it

    images = load_digits("train")
    classifier = sklearn.neural_network.MLPClassifier((64,), alpha=0.1, max_iter=1000, random_state=0)
    classifier.fit(images.reshape(len(images), -1) / 255.0, load_digit_labels("train"))
    (w0, w1), (b0, b1) = (
        [np.asarray(array, np.float32) for array in arrays] for arrays in (classifier.coefs_, classifier.intercepts_)
    )

    def apply(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.nn.relu(_flatten(pixels) / 255.0 @ w0 + b0)
        return {"features": features, "logits": features @ w1 + b1, "pixels": _flatten(pixels)}

    digest = hashlib.sha256(b"".join(array.tobytes() for array in (w0, b0, w1, b1))).hexdigest()
    return FeatureNetwork("digits", digest, "none", apply)


def inception_network(source: str, strategy: tf.distribute.Strategy, resize: str | None = None) -> FeatureNetwork:
    """The Inception network of 2015, with `pool_3` as features.

    Args:
      source: a TF-Hub handle, a SavedModel folder, a frozen graph, or pytorch-fid's weights as .pth or .safetensors.
      strategy: where it will run.
      resize: a name in RESIZES; default: that of the program for which `source` was made.

    Raises:
      ConfigError: it cannot be fetched or read, or has no outputs `pool_3` and `logits`.
    """
    path = _local_path(source)
    try:
        with strategy.scope():
            classify, usual_resize = load_inception(path)
        outputs = classify(tf.zeros([1, _INCEPTION_SIZE, _INCEPTION_SIZE, 3]))
    except InputError as error:
        raise ConfigError("inception", f": {error}") from error
    except Exception as error:  # TensorFlow raises a dozen types for a damaged graph
        raise ConfigError(
            "inception", f"={source} is no Inception network ({first_line(error)}): {_LOCAL_COPY}"
        ) from error
    found = set(outputs) if isinstance(outputs, dict) else set()
    missing = {"pool_3", "logits"} - found
    if missing:
        raise ConfigError(
            "inception",
            f"={source} has no output named {' or '.join(sorted(missing))}; named outputs:"
            f" {', '.join(sorted(found)) or 'none'}",
        )
    for name in ("pool_3", "logits"):
        if outputs[name].dtype != tf.float32 or not outputs[name].shape.rank or outputs[name].shape[0] != 1:
            raise ConfigError(
                "inception",
                f"={source} is no Inception network: {name} of one image is {outputs[name].dtype.name}"
                f" {tuple(outputs[name].shape)}, not float32 (1, ...)",
            )

    resize = resize or usual_resize

    def apply(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = classify(inception_input(pixels, resize))
        # An old graph may not know the shapes of its outputs, but their batch size is that of the input.
        pool_3, logits = (tf.reshape(outputs[name], [pixels.shape[0], -1]) for name in ("pool_3", "logits"))
        return {"features": pool_3, "logits": logits}

    return FeatureNetwork("inception", _sha256(path), _RESIZE_NAMES[resize], apply)


def inception_input(pixels: tf.Tensor, resize: str = "tf1") -> tf.Tensor:
    """Resizes and scales pixels [B, H, W, 1 or 3] in [0, 255] for Inception: [B, 299, 299, 3] in about [-1, 1].

    Args:
      pixels: the images.
      resize: "tf1": bilinear without half-pixel centres, and x / 128 - 1, as the graph of 2015, TF-GAN and the programs
        of the paper, of EDM and of guided diffusion; "pytorch_fid": bilinear with them, and x / 127.5 - 1. Neither
        filters against aliasing.
    """
    if pixels.shape[-1] == 1:
        pixels = tf.repeat(pixels, 3, axis=-1)
    size, half_pixel = [_INCEPTION_SIZE, _INCEPTION_SIZE], resize == "pytorch_fid"
    resized = tf.raw_ops.ResizeBilinear(images=pixels, size=size, align_corners=False, half_pixel_centers=half_pixel)
    return resized / 127.5 - 1.0 if half_pixel else (resized - 128.0) / 128.0


def in_batches(
    network: FeatureNetwork, strategy: tf.distribute.Strategy, batch_size: int
) -> Callable[[np.ndarray | tf.Tensor], Arrays]:
    """A function that applies `network` to pixels [N, H, W, C] in [0, 255] for any N, batch by batch."""
    apply = over_replicas(lambda _, pixels: network.apply(pixels), strategy, batch_size)

    def outputs_of(pixels: np.ndarray | tf.Tensor) -> Arrays:
        batches = [apply(0, pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    return outputs_of


def _local_path(source: str) -> str:
    """The local path of `source`, which it fetches from TF-Hub if it is a handle."""
    if not source.startswith(("http://", "https://")):
        path = os.path.expanduser(source)
        if not tf.io.gfile.exists(path):
            raise ConfigError("inception", f"={source} does not exist: {_LOCAL_COPY}")
        return path
    try:
        import tensorflow_hub  # imports tf_keras, and only a handle needs it

        return tensorflow_hub.resolve(source)
    except (ImportError, OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ConfigError("inception", f"={source} cannot be fetched ({first_line(error)}): {_LOCAL_COPY}") from error


def _sha256(path: str) -> str:
    """Digest of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    files = [path]
    if tf.io.gfile.isdir(path):
        files = sorted(os.path.join(folder, name) for folder, _, names in tf.io.gfile.walk(path) for name in names)
    for file in files:
        digest.update(f"{os.path.relpath(file, path)}\n".encode())
        digest.update(read_file(file))
    return digest.hexdigest()
