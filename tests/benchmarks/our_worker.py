"""The project's own denoiser, training step, sampling loop and input pipeline on this CPU, as the programs run them."""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds
import timing

from diffusion_tf.data import open_source
from diffusion_tf.data.image_folders import find_images
from diffusion_tf.data.prepare_tfrecords import prepare
from diffusion_tf.data.source import training_batches
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.presets import PRESETS, Preset, get_preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import cpu_backend, replica_function
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import ReverseProcess
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.step import loss_and_gradients
from diffusion_tf.training.trainer import Trainer
from diffusion_tf.unet import UNet

_TRAIN_STEPS = {"digits": 50, "cifar10": 2}  # of one call
_SAMPLE_STEPS = 10
_CONVOLUTIONS = 20
_INPUT_BATCHES = 20
_RECORDS = {32: 5000, 256: 500}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=[*_MAKERS, "input", "cached_input", "tfrecord_input", "data"])
    parser.add_argument("--preset", choices=list(PRESETS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data")
    args = parser.parse_args()
    if args.what == "data":
        _write_tfds(args.data)
        _write_tfrecords(args.data)
        return
    preset = get_preset(args.preset, batch_size=args.batch, precision=args.precision)
    if args.what.endswith("input"):
        call, steps = _input(preset, args.data, args.what)
    else:
        call, steps = _MAKERS[args.what](preset)
    timing.serve(call, steps_per_call=steps, version=tf.__version__)


def _convolution(preset: Preset, make_kernel=tf.Variable):
    """The network's most frequent operation by itself, as TensorFlow has it: a chain, each with a kernel of its own."""
    channels, dtype = preset.ch, preset.precision
    draw = lambda *shape: tf.cast(tf.random.normal(shape), dtype)
    kernels = [make_kernel(draw(3, 3, channels, channels) / (9 * channels) ** 0.5) for _ in range(_CONVOLUTIONS)]

    @tf.function(autograph=False)
    def chain(x):
        for kernel in kernels:
            x = tf.nn.conv2d(x, kernel, strides=1, padding="SAME")
        return tf.reduce_sum(x)

    x = draw(preset.batch_size, *preset.image_shape[:2], channels)
    return lambda: chain(x).numpy(), _CONVOLUTIONS


def _constant_convolution(preset: Preset):
    """With kernels that are part of the graph, which oneDNN brings into its own order but once."""
    return _convolution(preset, make_kernel=lambda kernel: kernel.numpy())


def _trained(preset: Preset) -> TrainedModel:
    """As from a checkpoint."""
    return TrainedModel(preset, make_strategy(), UNet.from_preset(preset, weights="frozen"))


def _forward(preset: Preset):
    trained = _trained(preset)
    call = lambda _, x, t: trained.denoise_fn()(x, t)
    denoise = trained.over_replicas(call, preset.batch_size)
    x, t = tf.random.normal((preset.batch_size, *preset.image_shape)), tf.range(preset.batch_size)
    return lambda: denoise(0, x, t).numpy(), 1


def _gradients(preset: Preset):
    """What a training step is made of, without clipping, Adam and EMA."""
    trainer = Trainer(preset, make_strategy())

    def gradients(images):
        params = [tf.convert_to_tensor(w) for w in trainer.state.params]
        return loss_and_gradients(trainer.state.model, preset, params, images, CounterRng(preset.seed, 0, 0))

    run = tf.function(replica_function(gradients, trainer.strategy, cpu_backend(preset.image_pixels)))
    images = tf.zeros((preset.batch_size, *preset.image_shape), tf.uint8)
    return lambda: run(images)[0].numpy(), 1


def train(preset: Preset, steps: int):
    """A function that takes `steps` training steps in one call, as the training loop does; and `steps`."""
    trainer = Trainer(preset, make_strategy())
    images = np.random.RandomState(0).randint(256, size=(preset.batch_size, *preset.image_shape)).astype(np.uint8)
    batches = iter(tf.data.Dataset.from_tensors(images).repeat())
    return lambda: float(trainer.run_steps(batches, tf.constant(steps))["loss"]), steps


def _train(preset: Preset):
    return train(preset, _TRAIN_STEPS[preset.dataset])


def _sample(preset: Preset):
    """The first steps of what `Sampler` runs: its own calls to the device are of 50 of the 1000 steps."""
    trained = _trained(preset)
    process = ReverseProcess(trained, batch_size=preset.batch_size, seed=0)
    x_t = process.noise(preset.batch_size)
    start = preset.num_timesteps
    return lambda: process(x_t, start, start - _SAMPLE_STEPS), _SAMPLE_STEPS


def _input(preset: Preset, data: str, what: str):
    """Seconds are of one image.

    Of `cached_input`, pictures through the cache, and `tfrecord_input`, which take turns, each call starts anew: going
    on, one would fill its buffers while the other is timed.
    """
    if what == "cached_input":
        places = {"images": os.path.join(data, "images"), "cache_dir": os.path.join(data, "cache")}
        settings = DataSettings(**places, held_out=0.0)
    else:
        tfrecord = os.path.join(data, "bench-r08-*.tfrecords") if preset.image_size == 256 else None
        settings = DataSettings(data_dir=data, tfrecord=tfrecord)
    source, batch = open_source(preset, "train", settings), preset.batch_size
    start = lambda: iter(training_batches(source, batch_size=batch, per_replica=batch, seed=0, start_step=0))
    batches = start() if what == "input" else None

    def call():
        taken = batches or start()
        for _ in range(_INPUT_BATCHES):
            next(taken)

    return call, _INPUT_BATCHES * batch


def _images(size: int):
    """Smooth colours and a little noise, whose PNG is about as long as a photograph's."""
    random = np.random.RandomState(0)
    for _ in range(_RECORDS[size]):
        coarse = PIL.Image.fromarray(random.randint(256, size=(8, 8, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((size, size), PIL.Image.Resampling.BICUBIC), np.float32)
        yield np.clip(smooth + random.normal(scale=4, size=smooth.shape), 0, 255).astype(np.uint8)


def _write_tfds(data: str) -> None:
    builder = tfds.builder("cifar10", data_dir=data)
    examples = ((f"{i}", {"id": f"{i}", "image": image, "label": i % 10}) for i, image in enumerate(_images(32)))
    builder._split_generators = lambda *_, **__: {"train": examples}
    builder.download_and_prepare()


def _write_tfrecords(data: str) -> None:
    source = os.path.join(data, "images")
    os.makedirs(source)
    for i, image in enumerate(_images(256)):
        PIL.Image.fromarray(image).save(os.path.join(source, f"{i:05d}.png"))
    prepare(find_images(source), data, name="bench", resolution=256, num_shards=4, num_workers=1, skip_bad_images=0)


_MAKERS = {
    "convolution": _convolution,
    "constant_convolution": _constant_convolution,
    "forward": _forward,
    "gradients": _gradients,
    "train": _train,
    "sample": _sample,
}

if __name__ == "__main__":
    main()
