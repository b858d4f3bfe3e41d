"""One process, as the functions about several see it; test_multi_worker.py starts two."""

import pytest
import tensorflow as tf

from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.runtime.workers import any_worker, is_chief, is_multi_worker, lost_worker_errors


@pytest.mark.parametrize("name", ["one_device", "mirrored"])
def test_the_only_process_is_the_chief(name):
    strategy = make_strategy(name)
    assert is_chief(strategy) and not is_multi_worker(strategy)
    assert any_worker(strategy, True) and not any_worker(strategy, False)


def test_errors_of_a_single_process_stay_as_they_are():
    error = tf.errors.UnavailableError(None, None, "the device")
    with pytest.raises(tf.errors.UnavailableError), lost_worker_errors(make_strategy("one_device")):
        raise error
