"""What a training run must fit in: the memory of a device, or an amount of time; and the recipe that fits.

The time of a step is measured, and the memory is estimated. Widths of a network scale the time by their multiply-adds.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from diffusion_tf.errors import ConfigError
from diffusion_tf.network_size import network_size
from diffusion_tf.presets import Preset

GIB = 2**30
USABLE = 0.9  # of a device's memory; the rest is its driver's, and lost between allocations
_ENOUGH_STEPS = 2000  # a smaller network that can take these is better than a larger one that cannot
_SPARE = 0.95  # of the time that is left after measuring; checkpoints and the noise of a machine take the rest
# What shrinks, in this order. For memory the batch comes first, since a step of half the images takes half the time.
MEMORY_ORDER = ("batch_size", "ch", "num_res_blocks")
TIME_ORDER = ("ch", "num_res_blocks", "batch_size")
_SMALLER: dict[str, Callable[[int], Sequence[int]]] = {
    "batch_size": lambda size: [size >> i for i in range(1, size.bit_length()) if size >> i >= 16],
    "ch": lambda ch: range(ch - 32, 0, -32),
    "num_res_blocks": lambda blocks: range(blocks - 1, 0, -1),
}


class Cost(NamedTuple):
    """What training costs.

    Attributes:
      compile_seconds: time before the first step.
      step_seconds: time of a step.
    """

    compile_seconds: float
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run must fit in.

    Attributes:
      name: as the user gives it.
      memory_bytes: of a GPU; None: no limit is given.
      seconds: of the whole run, or None.
      slice_name: a TPU slice, or None.
    """

    name: str
    memory_bytes: int | None = None
    seconds: float | None = None
    slice_name: str | None = None


def parse_budget(text: str, slices: Sequence[str]) -> Budget:
    """Reads `cpu`, `gpu24g`, `minutes:30` or the name of a TPU slice.

    Raises:
      ConfigError: it is none of these.
    """
    if text == "cpu":
        return Budget(text)
    if text in slices:
        return Budget(text, slice_name=text)
    if (match := re.fullmatch(r"gpu([1-9]\d{0,3})g", text)) is not None:
        return Budget(text, memory_bytes=int(match[1]) * GIB)
    if (match := re.fullmatch(r"minutes:(\d{1,6}(?:\.\d+)?)", text)) is not None and float(match[1]) > 0:
        return Budget(text, seconds=60 * float(match[1]))
    raise ConfigError("fit", f"={text}: give cpu, minutes:30, the memory of a GPU as gpu24g, or {', '.join(slices)}")


class Choices:
    """The recipes to choose from.

    Args:
      choose: makes a recipe of values for some fields.
      fixed: the fields whose values the user gave.
    """

    def __init__(self, choose: Callable[..., Preset], fixed: Collection[str]):
        self.choose, self.fixed = choose, fixed

    @classmethod
    def of(cls, preset: Preset, fixed: Collection[str]) -> "Choices":
        """`preset` alone, which may take fewer steps unless `fixed` says how many."""
        return cls(lambda **changes: dataclasses.replace(preset, **changes), {*MEMORY_ORDER, *fixed})

    def smaller(self, order: Sequence[str]) -> Iterator[dict[str, int]]:
        """The values that make the recipe itself, then smaller ones; the fields of `order` shrink one after another."""
        changes: dict[str, int] = {}
        yield changes
        first = self.choose()
        for name in order:
            if name not in self.fixed:
                for value in _SMALLER[name](getattr(first, name)):
                    changes = {**changes, name: value}
                    yield changes


def work(preset: Preset) -> int:
    """The multiply-adds of a step's forward passes, to which its time is proportional on one machine."""
    return network_size(preset).multiply_adds * preset.batch_size


def fit_time(
    choices: Choices,
    seconds: float,
    measure: Callable[[Preset], Cost],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Preset, Cost]:
    """The largest network that takes enough steps in `seconds`, which include measuring; and its cost.

    It measures the smallest network, and then the one that its multiply-adds suggest, if that is another. A recipe has
    no more steps than without a limit, and draws no samples.

    Args:
      choices: the recipes.
      seconds: from now to the last step.
      measure: trains a few steps.
      clock: the time in seconds.

    Raises:
      ConfigError: not even the smallest network can be trained.
    """
    deadline = clock() + seconds
    ladder = list(choices.smaller(TIME_ORDER))
    presets = [choices.choose(**changes) for changes in ladder]
    measured = best = len(presets) - 1
    for _ in range(2):
        measured = best
        cost = measure(presets[measured])
        left = _SPARE * (deadline - clock() - cost.compile_seconds)
        per_work = cost.step_seconds / work(presets[measured])
        steps = [left / (per_work * work(preset)) for preset in presets]
        enough = (i for i, preset in enumerate(presets) if steps[i] >= min(preset.num_steps, _ENOUGH_STEPS))
        best = next(enough, len(presets) - 1)
        if best == measured:
            break
    preset, limit = presets[best], int(steps[best])
    if limit < (preset.num_steps if "num_steps" in choices.fixed else 1):
        raise ConfigError(
            "fit",
            f"=minutes:{seconds / 60:g}: too short: here the smallest network compiles in {cost.compile_seconds:.0f} s,"
            f" and a step takes {per_work * work(presets[-1]):.2g} s",
        )
    num_steps = min(limit, preset.num_steps)
    changes = {"sample_every": 0, "num_steps": num_steps, **ladder[best]}
    preset = choices.choose(**{name: value for name, value in changes.items() if name not in choices.fixed})
    return preset, Cost(cost.compile_seconds, per_work * work(preset))


def fit_memory(choices: Choices, fits: Callable[[Preset], bool], budget: Budget) -> Preset:
    """The first of ever smaller recipes that `fits`; the network stays while a smaller batch helps.

    Raises:
      ConfigError: none does.
    """
    preset = None
    for changes in choices.smaller(MEMORY_ORDER):
        preset = choices.choose(**changes)
        if fits(preset):
            return preset
    assert preset is not None
    raise ConfigError(
        "fit",
        f"={budget.name}: {preset.batch_size} images of {'x'.join(map(str, preset.image_shape))} with `ch={preset.ch}`"
        " do not fit: make them smaller",
    )
