"""The recipe that fits a memory or a time, with a clock and a machine that the tests make up."""

import dataclasses

import pytest

from diffusion_tf.budgets import GIB, Budget, Choices, Cost, fit_memory, fit_time, parse_budget, work
from diffusion_tf.errors import ConfigError
from diffusion_tf.network_size import training_bytes
from diffusion_tf.presets import get_preset
from diffusion_tf.recipes import choose_preset


def choices(shape=(32, 32, 3), num_images=50_000, **fixed):
    return Choices(lambda **changes: choose_preset(shape, num_images, **{**changes, **fixed}), fixed)


class Machine:
    """A machine of a known speed, whose clock runs while it measures."""

    def __init__(self, work_per_second, compile_seconds=20.0):
        self.work_per_second, self.compile_seconds = work_per_second, compile_seconds
        self.now, self.measured = 1000.0, []

    def measure(self, preset):
        cost = Cost(self.compile_seconds, work(preset) / self.work_per_second)
        self.now += cost.compile_seconds + 4 * cost.step_seconds
        self.measured.append(preset)
        return cost

    def train(self, preset):
        self.now += self.compile_seconds + preset.num_steps * work(preset) / self.work_per_second


@pytest.mark.parametrize("minutes", [2, 10, 60, 600])
@pytest.mark.parametrize("speed", [1e11, 1e12, 1e14])
def test_measuring_and_training_end_in_time(minutes, speed):
    machine = Machine(speed)
    start = machine.now
    preset, cost = fit_time(choices(), 60 * minutes, machine.measure, lambda: machine.now)
    machine.train(preset)
    assert machine.now - start <= 60 * minutes
    whole = choose_preset((32, 32, 3), 50_000).num_steps
    assert machine.now - start > 0.85 * 60 * minutes or preset.num_steps == whole
    assert cost.step_seconds == pytest.approx(work(preset) / speed) and len(machine.measured) <= 2
    assert preset.sample_every == 0


def test_more_time_or_speed_never_gives_a_smaller_network():
    def width(minutes, speed):
        machine = Machine(speed)
        return fit_time(choices(), 60 * minutes, machine.measure, lambda: machine.now)[0].ch

    by_time = [width(minutes, 1e12) for minutes in (2, 10, 60, 600, 6000)]
    by_speed = [width(10, speed) for speed in (1e11, 1e12, 1e13, 1e14, 1e15)]
    assert by_time == sorted(by_time) and by_speed == sorted(by_speed)
    assert by_time[0] == by_speed[0] == 32 and by_time[-1] == by_speed[-1] == 128


def test_what_the_user_gives_stays():
    machine = Machine(1e12)
    fixed = {"ch": 96, "batch_size": 128, "num_res_blocks": 2, "sample_every": 100, "steps_per_loop": 10}
    preset, _ = fit_time(choices(**fixed), 600, machine.measure, lambda: machine.now)
    assert {name: getattr(preset, name) for name in fixed} == fixed
    assert len(machine.measured) == 1 and preset.num_steps < 1200
    digits = get_preset("digits")
    preset, _ = fit_time(Choices.of(digits, ()), 600, machine.measure, lambda: machine.now)
    assert dataclasses.replace(preset, sample_every=digits.sample_every) == digits


@pytest.mark.parametrize("fixed", [{}, {"num_steps": 100_000}])
def test_a_time_in_which_nothing_trains_is_refused(fixed):
    machine = Machine(1e12 if fixed else 1e6)
    with pytest.raises(ConfigError, match=r"fit=minutes:1: too short: here the smallest network compiles in 20 s, and"):
        fit_time(choices(**fixed), 60, machine.measure, lambda: machine.now)


def test_memory_takes_from_the_batch_before_the_network():
    def fitted(gibibytes, **fixed):
        limit = gibibytes * GIB
        return fit_memory(choices(**fixed), lambda p: training_bytes(p, p.batch_size) <= limit, Budget("gpu"))

    whole = choose_preset((32, 32, 3), 50_000)
    assert fitted(80) == whole
    half = fitted(training_bytes(whole, 128) / GIB - 0.1)
    assert (half.ch, half.batch_size) == (128, 64) and half.num_steps > whole.num_steps
    small = fitted(1)
    assert small.batch_size == 16 and small.ch < 128 and training_bytes(small, 16) <= GIB
    with pytest.raises(ConfigError, match="fit=gpu: 128 images of 32x32x3 with `ch=32` do not fit"):
        fitted(0.1, batch_size=128)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("cpu", Budget("cpu")),
        ("gpu24g", Budget("gpu24g", memory_bytes=24 * GIB)),
        ("minutes:1.5", Budget("minutes:1.5", seconds=90.0)),
        ("v3-8", Budget("v3-8", slice_name="v3-8")),
    ],
)
def test_budgets_are_read(text, budget):
    assert parse_budget(text, ["v3-8"]) == budget


@pytest.mark.parametrize(
    "text", ["", "gpu", "gpu0g", "gpu24", "minutes", "minutes:0", "minutes:-1", "v9-8", "minutes:1e9"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match=r"give cpu, minutes:30, the memory of a GPU as gpu24g, or v3-8"):
        parse_budget(text, ["v3-8"])
