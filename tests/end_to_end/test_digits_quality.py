"""The digits preset reaches its precision and recall after minutes of training."""

import pytest

from diffusion_tf.data import open_source
from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.metrics import precision_recall
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.loop import train
from diffusion_tf.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_digits_reach_precision_and_recall(tmp_path, precision):
    preset, strategy, workdir = (
        get_preset("digits", precision=precision),
        make_strategy("one_device"),
        Workdir(tmp_path),
    )
    trainer = Trainer(preset, strategy)
    train(trainer, workdir, open_source(preset))
    _, checkpoint = checkpoints.find(workdir.checkpoints)
    trained = TrainedModel.from_checkpoint(preset, strategy, checkpoint)
    samples = Sampler(trained, batch_size=250, seed=0).draw(1000)
    real, generated = (images.reshape(len(images), -1).astype(float) for images in (load_digits(), samples))
    found, covered = precision_recall(real, generated)
    print(f"{precision}: precision {found:.3f}, recall {covered:.3f}")
    assert found >= 0.80 and covered >= 0.75
