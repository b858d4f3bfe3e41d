"""The training state and the checkpoints that it is restored from."""

import dataclasses

import pytest
from support.tiny_runs import TINY, assert_equal_arrays

from diffusion_tf.errors import InputError
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.training.state import TrainState, state_arrays


def test_a_checkpoint_restores_every_variable(tmp_path):
    state, other = (TrainState(TINY, make_strategy("one_device")) for _ in range(2))
    for number, variable in enumerate([*state.params, *state.ema, *state.adam_m, *state.adam_v, state.step]):
        variable.assign(variable + (number + 1))
    arrays = state.to_arrays()
    other.restore(checkpoints.save(str(tmp_path), 3, arrays))
    assert_equal_arrays(other.to_arrays(), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ch": 64}, "holds another network: .* is float32"), ({"num_res_blocks": 2}, "another network: .* is missing")],
)
def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(tmp_path, change, message):
    strategy = make_strategy("one_device")
    path = checkpoints.save(str(tmp_path), 0, TrainState(TINY, strategy).to_arrays())
    other = TrainState(dataclasses.replace(TINY, **change), strategy)
    before = other.to_arrays()
    with pytest.raises(InputError, match=message):
        other.restore(path)
    assert_equal_arrays(other.to_arrays(), before)


def test_converted_weights_have_the_arrays_of_a_new_run():
    new = TrainState(TINY, make_strategy("one_device")).to_arrays()
    weights = {name.removeprefix("params/"): array for name, array in new.items() if name.startswith("params/")}
    assert_equal_arrays(state_arrays(weights, weights, step=9), new)
