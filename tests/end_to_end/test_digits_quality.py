"""The digits preset reaches its precision and recall after minutes of training, and its classes with labels."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.conditioning import UNLABELLED, Condition
from diffusion_tf.data import open_source
from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.feature_networks import digits_network
from diffusion_tf.evaluation.metrics import precision_recall
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.loop import train
from diffusion_tf.training.trainer import Trainer


def trained_digits(tmp_path, preset):
    strategy, workdir = make_strategy("one_device"), Workdir(tmp_path)
    train(Trainer(preset, strategy), workdir, open_source(preset))
    _, checkpoint = checkpoints.find(workdir.checkpoints)
    return TrainedModel.from_checkpoint(preset, strategy, checkpoint)


def precision_and_recall(samples):
    real, generated = (images.reshape(len(images), -1).astype(float) for images in (load_digits(), samples))
    return precision_recall(real, generated)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_digits_reach_precision_and_recall(tmp_path, precision):
    trained = trained_digits(tmp_path, get_preset("digits", precision=precision))
    found, covered = precision_and_recall(Sampler(trained, batch_size=250, seed=0).draw(1000))
    print(f"{precision}: precision {found:.3f}, recall {covered:.3f}")
    assert found >= 0.80 and covered >= 0.75


@pytest.mark.slow
def test_digits_of_an_asked_class_are_recognised_and_those_of_none_stay_as_good(tmp_path):
    trained = trained_digits(tmp_path, get_preset("digits", num_classes=10))
    settings = SamplerSettings(steps=20)
    guided = Sampler(trained, batch_size=250, seed=0, settings=settings, condition=Condition(guidance=2.0))
    samples, asked = guided.draw(1000), guided.condition.of_images(0, 1000)
    logits = digits_network().apply(tf.cast(samples, tf.float32))["logits"]
    recognised = np.bincount(asked[np.argmax(logits, axis=1) == asked], minlength=10)
    print(f"of 100 of each class: {recognised.tolist()}")
    assert recognised.min() >= 90
    found, covered = precision_and_recall(Sampler(trained, batch_size=250, seed=0, condition=UNLABELLED).draw(1000))
    print(f"no label: precision {found:.3f}, recall {covered:.3f}")
    assert found >= 0.80 and covered >= 0.75
