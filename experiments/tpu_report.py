"""Compiles a preset's steps for Cloud TPUs, on any CPU, and projects how fast it trains and samples there.

  python -m experiments.tpu_report --dataset=cifar10 --precision=bfloat16 --topology=v3-8 --topology=v5e-8

For each slice it tells whether a training step of --batch_size images and a sampling step of --sample_batch_size images
compile, how much memory they need and how long they may take. At the paper's sizes each takes a minute or more to
compile, and --find_batch compiles about eight. Nothing runs on a TPU.
"""

import dataclasses
import sys
from importlib.metadata import version
from typing import Any

from absl import flags

from diffusion_tf.interop.tpu_compiler import TOPOLOGIES, require_compiler

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
_flags.define_path("out", None, "JSON file to write.")

_program.parse_flags(__name__, _flags.preset_from_flags)

from diffusion_tf.interop.tpu_projection import NOTE, SliceProjector, compare_with_paper, to_profile, to_table
from diffusion_tf.storage.json_files import write_json


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    require_compiler()
    preset = _flags.preset_from_flags()
    out = _flags.out_path("", ".json") if FLAGS.out else None
    sample_batch_size = FLAGS.sample_batch_size or (256 if preset.image_pixels <= 64 * 64 else 128)
    slices = []
    for projector in (SliceProjector(name, _log) for name in FLAGS.topology):
        train_preset = projector.per_device(preset, "batch_size", preset.batch_size)
        slices.append((projector, train_preset, projector.per_device(preset, "sample_batch_size", sample_batch_size)))
    topologies: dict[str, Any] = {}
    for projector, train_preset, sample_preset in slices:
        columns = {
            "train_step": projector.project("train_step", train_preset),
            "sample_step": projector.project("sample_step", sample_preset),
        }
        if projector.name == "v3-8":
            compare_with_paper(preset, columns["train_step"], columns["sample_step"])
        if FLAGS.find_batch:
            columns["largest train_step"] = projector.project_largest_batch(train_preset)
        print(f"\n{to_table(projector.name, columns)}")
        if FLAGS.profile:
            for what, row in columns.items():
                print(f"\n{to_profile(f'{projector.name}, {what}', row, TOPOLOGIES[projector.name].chip.clock_hertz)}")
        topologies[projector.name] = columns
    print(f"\n{NOTE}")
    if out:
        report = {"note": NOTE, "libtpu": version("libtpu"), "preset": dataclasses.asdict(preset)}
        write_json(out, {**report, "topologies": topologies})
        print(f"numbers: {out}")


if __name__ == "__main__":
    _program.run(main)
