"""Labels and guidance: which label an image has, what is refused, and how a text names classes."""

import numpy as np
import pytest

from diffusion_tf.conditioning import Condition, parse_labels
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import get_preset

PLAIN, THREE = get_preset("digits"), get_preset("digits", num_classes=3)


@pytest.mark.parametrize(
    ("preset", "labels", "expected"),
    [
        (PLAIN, (), [-1] * 7),
        (THREE, (), [2, 0, 1, 2, 0, 1, 2]),
        (THREE, (2, -1), [-1, 2, -1, 2, -1, 2, -1]),
        (THREE, (1,), [1] * 7),
    ],
)
def test_images_take_the_labels_in_turn(preset, labels, expected):
    found = Condition(labels).resolve(preset).of_images(5, 7)
    assert found.tolist() == expected and found.dtype == np.int32


@pytest.mark.parametrize(
    ("preset", "labels", "guidance", "message"),
    [
        (THREE, (0, 3), 0.0, "label=3: the run has classes 0 to 2, and -1 is no label"),
        (PLAIN, (0,), 0.0, "label=0: the run has no classes"),
        (PLAIN, (), 1.0, "guidance=1 needs a run with classes"),
        (THREE, (-1,), 1.0, "guidance=1 needs samples with a label"),
        (THREE, (), -0.5, "guidance=-0.5 must be 0 or more"),
        (THREE, (), float("nan"), "guidance=nan must be 0 or more"),
    ],
)
def test_impossible_conditions_are_refused(preset, labels, guidance, message):
    with pytest.raises(ConfigError, match=message):
        Condition(labels, guidance).resolve(preset)


def test_a_description_tells_samples_of_a_conditional_run_apart():
    conditions = [Condition(), Condition((0,)), Condition((0, 1)), Condition((-1,)), Condition((0,), 2)]
    descriptions = [condition.describe(THREE) for condition in conditions]
    assert len({tuple(description.items()) for description in descriptions}) == 5
    assert Condition((0, 1, 2)).describe(THREE) == descriptions[0] == {"labels": "all", "guidance": 0.0}
    assert Condition().describe(PLAIN) == {}


def test_a_text_names_classes_or_their_indices():
    classes = ("cat", "black, white", "7")
    assert parse_labels("cat", classes, 3) == (0,)
    assert parse_labels("1, cat,none", classes, 3) == (1, 0, -1)
    assert parse_labels("black, white", classes, 3) == (1,)
    assert parse_labels("7", classes, 3) == (2,)  # a name before an index
    assert parse_labels("2", (), 3) == (2,)
    with pytest.raises(ConfigError, match=r"label=dog: choose from cat, black, white, 7 \(indices 0 to 2\), or none"):
        parse_labels("dog", classes, 3)
    with pytest.raises(ConfigError, match="label=3: choose from no classes in this run, or none"):
        parse_labels("3", (), 0)
