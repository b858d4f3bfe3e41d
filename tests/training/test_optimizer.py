"""The learning rate and the update of Adam and EMA."""

import numpy as np
import pytest
import tensorflow as tf
from support import golden
from support.tiny_runs import TINY

from diffusion_tf.ops import backend
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.training.optimizer import Gradients, adam_step, assign_adam_step, warmed_up_learning_rate
from diffusion_tf.training.state import TrainState


def test_the_learning_rate_warms_up_from_zero():
    rates = [float(warmed_up_learning_rate(2e-4, 4, tf.constant(step))) for step in range(6)]
    np.testing.assert_allclose(rates, golden.load("train_small")["lr"], rtol=1e-6)
    assert float(warmed_up_learning_rate(2e-4, 0, tf.constant(0))) == np.float32(2e-4)


@pytest.mark.parametrize("usable", [True, False])
def test_adam_in_place_equals_the_pure_function(usable):
    state, random = TrainState(TINY, make_strategy("one_device")), np.random.RandomState(0)
    draw = lambda v: random.normal(size=v.shape).astype(np.float32)
    for variables, scale in ((state.params, 1.0), (state.ema, 1.0), (state.adam_m, 0.1), (state.adam_v, 0.1)):
        for v in variables:
            v.assign(scale * (draw(v) if variables is not state.adam_v else draw(v) ** 2))
    grads = [tf.constant(draw(w)) for w in state.params]
    if not usable:
        grads = [tf.where(grad > 1.0, np.nan, tf.where(grad < -1.0, np.inf, grad)) for grad in grads]
    state.step.assign(7)
    before, clip = state.to_arrays(), tf.constant(0.25 if usable else np.nan)
    gradients = Gradients(grads, tf.linalg.global_norm(grads), clip, tf.constant(usable))
    expected = adam_step(state.tensors(), gradients, TINY)
    with backend.entered(backend.Backend(cpu_graph=True)):
        assign_adam_step(state, state.tensors(), gradients, TINY)
    pure = dict(zip(before, [v.numpy() for v in tf.nest.flatten(expected)], strict=True))
    for name, after in state.to_arrays().items():
        np.testing.assert_allclose(after, pure[name], rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.array_equal(after, before[name]) == (not usable and name != "step"), name
