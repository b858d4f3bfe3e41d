"""Compiles the programs of a preset for Cloud TPUs, on any CPU, and projects how fast it trains and samples at most.

  python -m experiments.tpu_report --dataset=cifar10 --precision=bfloat16 --topology=v3-8 --topology=v5e-8

For each slice it tells whether a training step of --batch_size images and a call of the sampler with
--sample_batch_size images compile, how much memory they need, how many cycles they take and what follows for a run. At
the paper's sizes each takes minutes to compile, and --find_batch compiles about eight. Nothing runs on a TPU.

TensorFlow for CPUs lowers the programs, and the newest libtpu compiles them. To see what a TPU VM compiles, name the
Python of an environment that tpu_scripts/install.sh made, in which `pip install jax==0.7.1 libtpu==0.0.21` added JAX:

  python -m experiments.tpu_report --dataset=cifar10 --tpu_python=.venv-tpu/bin/python
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop.tpu_compiler import require_compiler
from diffusion_tf.interop.tpu_projection import START_SECONDS
from diffusion_tf.interop.tpu_slices import CHIPS, TOPOLOGIES

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_preset_flags()
flags.DEFINE_multi_enum("topology", ["v3-8"], list(TOPOLOGIES), "Slice to compile for; may be given several times.")
flags.DEFINE_integer(
    "sample_batch_size", None, "Images sampled at once. Default: the paper's, 256 up to 64x64 pixels and 128 beyond.",
    lower_bound=1,
)  # fmt: skip
flags.DEFINE_boolean("find_batch", False, "Find the largest training batch that fits.")
flags.DEFINE_boolean("profile", False, "Print the ten operations of each program that take the most cycles.")
flags.DEFINE_string("tpu_python", None, "Python with tensorflow-tpu, JAX and libtpu, which lowers and compiles.")
flags.DEFINE_float(
    "start_ms",
    1000 * START_SECONDS,
    "Assumed milliseconds in which the host starts a program on the TPU.",
    lower_bound=0.0,
)
_flags.define_path("prices", None, "JSON file with the price of an hour of a chip by its type: see docs/tpu-speed.md.")
_flags.define_path("out", None, "JSON file to write.")

_program.parse_flags(__name__, _flags.preset_from_flags)

from diffusion_tf.interop.tpu_projection import (
    NOTE,
    SliceProjector,
    compare_with_paper,
    price,
    to_profile,
    to_summary,
    to_table,
)
from diffusion_tf.storage.json_files import read_json, write_json


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prices() -> dict[str, float | None]:
    if not FLAGS.prices:
        return {}
    prices = read_json(FLAGS.prices, dict[str, float | None])
    if unknown := set(prices) - set(CHIPS):
        raise InputError(f"{FLAGS.prices} has a price for {sorted(unknown)[0]!r}: choose from {', '.join(CHIPS)}")
    return prices


def main() -> None:
    require_compiler(FLAGS.tpu_python)
    preset, prices = _flags.preset_from_flags(), _prices()
    out = _flags.out_path("", ".json") if FLAGS.out else None
    sample_batch_size = FLAGS.sample_batch_size or (256 if preset.image_pixels <= 64 * 64 else 128)
    slices = []
    for name in FLAGS.topology:
        projector = SliceProjector(name, _log, FLAGS.start_ms / 1000, FLAGS.tpu_python)
        train_preset = projector.per_device(preset, "batch_size", preset.batch_size)
        slices.append((projector, train_preset, projector.per_device(preset, "sample_batch_size", sample_batch_size)))
    note = NOTE.format(start_ms=FLAGS.start_ms)
    topologies: dict[str, Any] = {}
    for projector, train_preset, sample_preset in slices:
        columns = {
            "train_step": projector.project("train_step", train_preset),
            "sample": projector.project("sample", sample_preset),
        }
        columns["train_step"]["price"] = price(columns["train_step"].get("run_hours"), projector.name, prices)
        if projector.name == "v3-8":
            compare_with_paper(preset, columns["train_step"], columns["sample"])
        if FLAGS.find_batch:
            columns["largest train_step"] = projector.project_largest_batch(train_preset)
        print(f"\n{to_table(projector.name, columns)}")
        if FLAGS.profile:
            for what, row in columns.items():
                print(f"\n{to_profile(f'{projector.name}, {what}', row)}")
        topologies[projector.name] = columns
        if out:  # after each slice: the next one takes minutes
            write_json(out, {"note": note, "preset": dataclasses.asdict(preset), "topologies": topologies})
    print(f"\n{to_summary(topologies)}\n\n{note}")
    if out:
        print(f"numbers: {out}")


if __name__ == "__main__":
    _program.run(main)
