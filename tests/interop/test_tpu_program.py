"""Every program that a TPUStrategy starts, traced without a TPU: TPUs refuse nothing in it."""

import dataclasses
import re

import numpy as np
import pytest
import tensorflow as tf
from support.golden import TINY
from support.tpu_kernels import refusals

from diffusion_tf.calibration import measure_calibration
from diffusion_tf.compression.tables import predictor
from diffusion_tf.conditioning import Condition
from diffusion_tf.evaluation.checkup import Checkup, Pictures
from diffusion_tf.evaluation.feature_networks import digits_network, in_batches, inception_input, pixels_network
from diffusion_tf.inpainting import Inpainter
from diffusion_tf.interop.tpu_program import TracingStrategy, as_function, in_program
from diffusion_tf.interop.tpu_program import sample as lower_sample
from diffusion_tf.interop.tpu_program import train_step as lower_train_step
from diffusion_tf.likelihood import BoundEvaluator
from diffusion_tf.rng import CounterRng
from diffusion_tf.samplers import ReverseProcess, Sampler, ddim_inversion
from diffusion_tf.solvers import SAMPLERS, SamplerSettings
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.optimizer import StateTensors
from diffusion_tf.training.step import train_step
from diffusion_tf.training.trainer import Trainer
from diffusion_tf.unet import UNet

NETWORK = dataclasses.replace(TINY, num_res_blocks=1, batch_size=2)  # one block at one resolution, with attention
WITH_CLASSES = dataclasses.replace(NETWORK, num_classes=3)
IMAGES = np.zeros((2, *NETWORK.image_shape), np.uint8)
X_T = np.zeros(IMAGES.shape, np.float32)


def trained_model(preset=NETWORK):
    return TrainedModel(preset, TracingStrategy())


def train(preset):
    strategy = TracingStrategy()
    trainer = Trainer(preset, strategy)
    images = tf.zeros((1, *preset.image_shape), tf.uint8)
    examples = (images, tf.zeros(1, tf.int32)) if preset.num_classes else images
    batches = strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.from_tensors(examples).repeat())
    sums = trainer.run_steps(iter(batches), tf.constant(3))
    assert sums["finite_steps"] == 3
    return strategy.programs


def draw(trained, **options):
    Sampler(trained, batch_size=2, seed=0, **options)(0)


def checkup(trained):
    pictures = Pictures.of(np.arange(128, dtype=np.uint8).reshape(IMAGES.shape), np.full(2, -1, np.int32))
    return Checkup(trained, pictures, num_images=2, num_samples=2, steps=4, batch_size=2, seed=0)


# Each calls what a TPU would run, with the zeros that TracingStrategy returns.
CALLS = {
    **{f"sample by {name}": lambda m, name=name: draw(m, settings=SamplerSettings(name, 4)) for name in SAMPLERS},
    "sample from images": lambda m: Sampler(m, batch_size=2, seed=0, settings=SamplerSettings(strength=0.5))(0, IMAGES),
    "clip dynamically": lambda m: draw(m, settings=SamplerSettings("ddim", 4, clip_sample="dynamic")),
    "stretches of the reverse process": lambda m: ReverseProcess(m, batch_size=2, seed=0)(X_T, 8, 0),
    "predicted x_0": lambda m: ReverseProcess(m, batch_size=2, seed=0).predict_xstart(X_T, 3),
    "inversion": lambda m: ddim_inversion(m, IMAGES, steps=4, spacing="trailing", batch_size=2),
    "inpainting": lambda m: Inpainter(m, batch_size=2, seed=0)(IMAGES, np.ones((2, 8, 8, 1), bool)),
    "the bound": lambda m: BoundEvaluator(m, batch_size=2, seed=0)(0, IMAGES),
    "some terms of the bound": lambda m: BoundEvaluator(m, batch_size=2, seed=0, num_timesteps_estimate=3)(0, IMAGES),
    "calibration": lambda m: measure_calibration(m, IMAGES, timesteps=[0, 5], seed=0, batch_size=2),
    "the codec's predictions": lambda m: predictor(m, 2)(X_T, 3),
    "the doctor's walk": lambda m: checkup(m).algorithm_2(),
    "features of digits": lambda m: in_batches(digits_network(), m.strategy, 2)(IMAGES.astype(np.float32)),
    "features": lambda m: in_batches(pixels_network(NETWORK.image_shape), m.strategy, 2)(IMAGES.astype(np.float32)),
}


def all_of(programs):
    return set().union(*map(refusals, programs))


def test_a_tpu_refuses_nothing_in_a_training_step_and_sums_the_gradients_and_the_loss():
    program, norm_of_weights = train(NETWORK)
    assert all_of([program, norm_of_weights]) == set()
    trained = [op for op in program.get_operations() if in_program(op) and op.type == "AssignVariableOp"]
    sums = [op for op in program.get_operations() if op.type == "CrossReplicaSum"]
    assert len(trained) == 4 * (len(sums) - 1) + 1  # weights, EMA, Adam's two averages; the step


def test_a_tpu_refuses_nothing_in_a_sampler():
    trained = trained_model()
    draw(trained)
    assert len(trained.strategy.programs) == 2  # the noise, and the steps of all calls
    assert all_of(trained.strategy.programs) == set()


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (lambda x: tf.py_function(lambda y: y, [x], tf.float32, name="host"), "EagerPyFunc: no kernel"),
        (lambda x: tf.strings.length(tf.as_string(x)), "AsString: no kernel"),
        (lambda x: tf.where(x > 0), "Where: dynamic shape"),
        (lambda x: tf.cast(x, tf.complex128), "Cast: no kernel for"),
    ],
)
def test_the_check_finds_what_a_tpu_refuses(function, refused):
    strategy = TracingStrategy()

    @tf.function(autograph=False)
    def call(x):
        def replica(x):
            y = function(x)
            return x + tf.cast(tf.size(y), tf.float32)

        return strategy.run(replica, args=(x,))

    call(tf.zeros(3))
    assert any(problem.startswith(refused) for problem in all_of(strategy.programs))


@pytest.mark.slow
@pytest.mark.parametrize("what", CALLS)
def test_a_tpu_refuses_nothing_in(what):
    trained = trained_model()
    CALLS[what](trained)
    assert trained.strategy.programs and all_of(trained.strategy.programs) == set()


@pytest.mark.slow
def test_a_tpu_refuses_nothing_with_classes_in_bfloat16():
    preset = dataclasses.replace(WITH_CLASSES, precision="bfloat16", random_shift=1, dropout=0.1)
    assert all_of(train(preset)) == set()
    trained = trained_model(preset)
    draw(trained, condition=Condition(guidance=1.0))
    assert all_of(trained.strategy.programs) == set()


@pytest.mark.slow
def test_a_tpu_refuses_nothing_in_the_preprocessing_of_inception():
    strategy = TracingStrategy()
    call = tf.function(lambda x: strategy.run(inception_input, args=(x,)), autograph=False)
    call(tf.zeros((2, 32, 32, 3)))
    assert all_of(strategy.programs) == set()


@pytest.mark.slow
def test_the_program_of_a_step_computes_the_training_step():
    program, _ = train(NETWORK)
    function = as_function(program, num_replicas=1)  # so the sum is that of the first replica alone
    network, rng = UNet.from_preset(NETWORK), np.random.RandomState(0)
    groups = [[0.1 * rng.normal(size=w.shape) for w in network.trainable_variables] for _ in range(3)]
    params, ema, adam_m = [[tf.constant(w, tf.float32) for w in group] for group in groups]
    before = StateTensors(params, ema, adam_m, [tf.square(m) for m in adam_m], tf.constant(7, tf.int64))
    images = tf.constant(rng.randint(0, 256, (1, *NETWORK.image_shape)), tf.uint8)
    loss, norm, *state = tf.function(function.call, jit_compile=True, autograph=False)(
        tf.constant(0), images, *tf.nest.flatten(before)
    )
    expected = train_step(network, NETWORK, before, images, CounterRng(NETWORK.seed, before.step, 0), lambda x: x)
    np.testing.assert_allclose([loss, norm], [expected.loss, expected.grad_norm], rtol=1e-5)
    assert function.in_place == {i + 2: i + 2 for i in range(len(state))}
    for after, value in zip(tf.nest.flatten(expected.state), state, strict=True):
        np.testing.assert_allclose(value, after, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_lowered_step_sums_over_all_devices():
    lowered = lower_train_step(dataclasses.replace(NETWORK, batch_size=1), num_replicas=8)
    groups = re.findall(r"replica_groups = dense<(.*?)>", lowered.stablehlo)
    assert groups and set(groups) == {"[[0, 1, 2, 3, 4, 5, 6, 7]]"}
    assert len(lowered.in_place) == 4 * (len(groups) - 1) + 1 and lowered.kernels == "CPU"


@pytest.mark.slow
def test_the_lowered_sampler_takes_a_twentieth_of_the_steps():
    lowered = lower_sample(dataclasses.replace(NETWORK, num_timesteps=50), num_replicas=8)
    assert (lowered.num_steps, lowered.calls, lowered.in_place) == (3, 17, {})
    assert "stablehlo.while" in lowered.stablehlo and "all_reduce" not in lowered.stablehlo
