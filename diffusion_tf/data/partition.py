"""How images without splits and classes of their own are divided into them."""

import hashlib
from collections.abc import Sequence

from diffusion_tf.errors import InputError

Label = str | int


def hold_out(names: Sequence[str], fraction: float) -> list[bool]:
    """Chooses by a hash of its name whether each image is held out; at least one is, and at least one is not.

    Args:
      names: the names of the images.
      fraction: the expected fraction; 0 holds out none.

    Raises:
      InputError: there is only one image, and `fraction` is not 0.
    """
    if not fraction:
        return [False] * len(names)
    if len(names) == 1:
        raise InputError("there is one image, and one is held out: add others, or train on it alone by `held_out=0`")
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in names]
    values = [int.from_bytes(digest, "big") for digest in hashes]
    count = min(max(sum(value < fraction * 2**64 for value in values), 1), len(names) - 1)
    limit = sorted(values)[count]
    return [value < limit for value in values]


def index_classes(labels: Sequence[Label]) -> tuple[list[int], tuple[str, ...]]:
    """Returns the index of each label among the sorted labels, and these as the names of the classes.

    Raises:
      InputError: some labels are texts and others are numbers, or a number is negative.
    """
    if len({type(label) for label in labels}) > 1:
        raise InputError("some labels are texts and others are numbers: use one kind")
    if negative := next((label for label in labels if isinstance(label, int) and label < 0), None):
        raise InputError(f"the label {negative} is negative: number the classes from 0")
    classes = sorted(set(labels))
    index = {label: place for place, label in enumerate(classes)}
    return [index[label] for label in labels], tuple(map(str, classes))
