"""Measures bits/dim by the variational bound (Eq. 5) with the EMA weights of a trained run.

  python -m experiments.likelihood --workdir=runs/digits --split=test
  python -m experiments.likelihood --workdir=runs/cifar10 --split=test --num_images=500 --num_timesteps_estimate=20

This takes T network evaluations per image. The second command estimates the bound from 21, and tells the standard
error. The same command resumes an interrupted measurement. The results are likelihood_SPLIT.json in the workdir and a
PNG of the terms over t; an estimate is likelihood_SPLIT_estimate.json, without a picture.
"""

import math
import os
from typing import Any

import numpy as np
from absl import flags

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_bound_flags()
flags.DEFINE_integer(
    "num_timesteps_estimate", None, "Estimate the bound from L_0 and this many random terms per image.", lower_bound=1
)

_program.parse_flags(__name__, _flags.check_measured_run)

from diffusion_tf import figures
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.likelihood import Bound, appendix_c, mean_and_standard_error
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.json_files import write_json

from ._measured_run import MeasuredRun

_TABLE = """
{images}: {num_images} images{given}, step {step}
  bits/dim      {bits_per_dim:.5f}{error}{notes}
    L_T         {prior_bits_per_dim:.3e}
    L_1..L_T-1  {middle_bits_per_dim:.5f}
    L_0         {decoder_bits_per_dim:.5f}
Appendix C
  unit-variance data keeps its variance on the way to x_T: to {unit_variance_error:.1e}
  L_T if the same noise were added without scaling: {unscaled_prior_bits_per_dim:.3e} bits/dim
  the sampler's step and noise scales follow from beta: to {sampler_scale_error:.1e}
"""


def _result(run: MeasuredRun, bound: Bound) -> dict[str, Any]:
    bits_per_dim, standard_error = mean_and_standard_error(bound.total_bpd)
    schedule = GaussianDiffusion.from_preset(run.preset).schedule
    return {
        "bits_per_dim": bits_per_dim,
        "bits_per_dim_standard_error": standard_error,
        "prior_bits_per_dim": float(bound.prior_bpd.mean()),
        "middle_bits_per_dim": float(bound.middle_bpd.mean()),
        "decoder_bits_per_dim": float(bound.decoder_bpd.mean()),
        **appendix_c(schedule, float(bound.mean_square.mean())),
    }


def main() -> None:
    run = MeasuredRun.from_flags()
    estimate = "" if FLAGS.num_timesteps_estimate is None else "_estimate"
    out = _flags.out_path(os.path.join(run.results.path, f"likelihood_{FLAGS.split}{estimate}.json"), ".json")
    bound, subject = run.measure_bound(FLAGS.num_timesteps_estimate)
    result = {**subject, "num_timesteps_estimate": FLAGS.num_timesteps_estimate, **_result(run, bound)}
    error = result["bits_per_dim_standard_error"]
    if not math.isfinite(error):
        result["notes"]["bits_per_dim_standard_error"] = "undefined for one image"
    shown = f" +- {error:.5f} (standard error)" if math.isfinite(error) else ""
    notes = "".join(f"\n      {name}: {note}" for name, note in result["notes"].items())
    given = " given their labels" if "given" in result else ""
    print(_TABLE.format(**{**result, "error": shown, "notes": notes, "given": given}))
    if bound.terms_bpd is not None and bound.terms_standard_error is not None:
        result["terms_bits_per_dim"] = bound.terms_bpd.tolist()
        result["terms_bits_per_dim_standard_error"] = bound.terms_standard_error.tolist()
        t = np.arange(len(bound.terms_bpd))
        title = f"{subject['images']}: {result['bits_per_dim']:.3f} bits/dim"
        png = f"{os.path.splitext(out)[0]}.png"
        write_file(png, figures.curves([figures.Curve(title, "t", "L_t (bits/dim)", t, bound.terms_bpd, log_y=True)]))
        print(f"picture: {png}")
    write_json(out, result)
    print(f"numbers: {out}")


if __name__ == "__main__":
    _program.run(main)
