"""Which classes images are drawn from, and how strongly: labels and classifier-free guidance (Ho & Salimans 2022)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffusion_tf.errors import ConfigError, quoted
from diffusion_tf.presets import Preset

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Condition:
    """The labels of images, and the guidance towards them.

    Attributes:
      labels: image i has the label labels[i % len(labels)]; -1 is none. Default: every class in turn, or none if the
        network has no classes.
      guidance: w in (1 + w) f(x, label) - w f(x), where f is the network; 0 or more. diffusers' `guidance_scale` is
        w + 1.
    """

    labels: tuple[int, ...] = ()
    guidance: float = 0.0

    def resolve(self, preset: Preset) -> "Condition":
        """This with the default labels of `preset` filled in.

        Raises:
          ConfigError: there is no such class, or guidance without labels.
        """
        classes = range(preset.num_classes)
        labels = self.labels or tuple(classes) or (NO_LABEL,)
        for label in labels:
            if label != NO_LABEL and label not in classes:
                there = f"classes 0 to {len(classes) - 1}" if classes else "no classes"
                raise ConfigError("label", f"={label}: the run has {there}, and {NO_LABEL} is no label")
        if not 0 <= self.guidance < math.inf:
            raise ConfigError("guidance", f"={self.guidance} must be 0 or more")
        if self.guidance and set(labels) == {NO_LABEL}:
            why = "samples with a label" if classes else "a run with classes: train one with `conditional`"
            raise ConfigError("guidance", f"={self.guidance:g} needs {why}")
        return dataclasses.replace(self, labels=labels)

    def describe(self, preset: Preset) -> dict[str, Any]:
        """Labels (`all`, `none` or indices) and guidance, in a form that JSON can hold; empty without classes."""
        resolved = self.resolve(preset)
        if not preset.num_classes:
            return {}
        names = {tuple(range(preset.num_classes)): "all", (NO_LABEL,): "none"}
        labels = names.get(resolved.labels, ",".join(map(str, resolved.labels)))
        return {"labels": labels, "guidance": float(resolved.guidance)}

    def of_images(self, first: int, count: int) -> np.ndarray:
        """The labels of images first, ..., first + count - 1, int32 [count]; the condition must be resolved."""
        return np.resize(np.roll(np.array(self.labels, np.int32), -first), count)


def labels_of_images(labels: ArrayLike, num_images: int) -> np.ndarray:
    """One label for all images, or one for each, as int32 [num_images]."""
    return np.broadcast_to(np.asarray(labels, np.int32), num_images)


UNGUIDED = Condition()
UNLABELLED = Condition((NO_LABEL,))


def parse_labels(text: str, classes: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """Labels of a text such as "3", "cat,dog" or "none": names of `classes`, else their indices, separated by commas.

    Raises:
      ConfigError: there is no such class.
    """
    indices = {"none": NO_LABEL, **{str(i): i for i in range(num_classes)}}
    known = {**indices, **{name: i for i, name in enumerate(classes)}}
    # A name may hold a comma.
    labels = [known.get(part.strip()) for part in ([text] if text in known else text.split(","))]
    if None in labels:
        named = f"{', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}" if classes else "a number"
        there = f"{named} (indices 0 to {num_classes - 1})" if num_classes else "no classes in this run"
        raise ConfigError("label", f"={quoted(text)}: choose from {there}, or none")
    return tuple(label for label in labels if label is not None)
