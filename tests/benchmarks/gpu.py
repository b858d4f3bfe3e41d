r"""Compares exported steps with diffusers' UNet2DModel under torch.compile, on one NVIDIA GPU.

Export each step (`train_step`, `sample_step`, or `train_loop` with --steps_per_call=20) where this project is
installed:
  python -m experiments.export --dataset=cifar10 --what=train_step --per_replica_batch=128 --precision=bfloat16 \
    --out=DIR
Then time them where JAX, PyTorch and diffusers are installed with CUDA. This needs neither TensorFlow nor the exported
weights:
  python tests/benchmarks/gpu.py DIR [DIR ...]
"""

import argparse
import contextlib
import json
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import bench

_HERE = pathlib.Path(__file__).parent
_WHAT = {"train_step": "train", "train_loop": "train", "sample_step": "sample"}
_STEPS = 20  # in each call


def measure_export(folder: pathlib.Path, reps: int) -> dict:
    """Times an exported step and the same step of diffusers."""
    manifest = json.loads((folder / "manifest.json").read_text())
    preset, what = manifest["preset"], _WHAT[manifest["what"]]
    batch, precision = preset["batch_size"], preset["precision"]
    ours = [sys.executable, str(_HERE / "exported_worker.py"), str(folder), f"--steps={_STEPS}"]
    theirs = [sys.executable, str(_HERE / "diffusers_worker.py"), "--device=cuda", "--compile", f"--steps={_STEPS}"]
    theirs += [f"--what={what}", f"--batch={batch}", f"--precision={precision}", f"--preset={json.dumps(preset)}"]
    name = f"{manifest['what']} {preset['dataset']} batch {batch} {precision}"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        # Each compiles on the CPU for a minute or more, so they start together.
        workers = list(pool.map(lambda command: stack.enter_context(bench.Worker(*command)), (ours, theirs)))
        return bench.measure(name, what, dict(zip(("ours", "torch.compile"), workers, strict=True)), reps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="folders that experiments.export wrote")
    parser.add_argument("--json", default="build/bench/gpu.json", help="the JSON file to write")
    args = parser.parse_args()
    for folder in args.folders:
        if not any((folder / f"{what}.stablehlo.mlir").exists() for what in _WHAT):
            raise SystemExit(f"gpu: {folder} holds none of {', '.join(_WHAT)}: see --help")
    bench.report(args.json, (measure_export(folder.resolve(), 5) for folder in args.folders))


if __name__ == "__main__":
    main()
