r"""Speed of the exported steps beside diffusers' UNet2DModel under torch.compile, on one NVIDIA GPU.

Where this project is installed, for each row (`train_step` or `sample_step`):
  python -m experiments.export --dataset=cifar10 --what=train_step --per_replica_batch=128 --precision=bfloat16 \
    --out=DIR
and where JAX, PyTorch and diffusers are, all with CUDA; TensorFlow need not be, nor the exports' weights:
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
_WHAT = {"train_step": "train", "sample_step": "sample"}
_STEPS = 20  # of one call


def measure_export(folder: pathlib.Path, reps: int) -> dict:
    """The row of an exported step and diffusers' same."""
    manifest = json.loads((folder / "manifest.json").read_text())
    preset, what = manifest["preset"], _WHAT[manifest["what"]]
    batch, precision = preset["batch_size"], preset["precision"]
    ours = [sys.executable, str(_HERE / "exported_worker.py"), str(folder), f"--steps={_STEPS}"]
    theirs = [sys.executable, str(_HERE / "diffusers_worker.py"), "--device=cuda", "--compile", f"--steps={_STEPS}"]
    theirs += [f"--what={what}", f"--batch={batch}", f"--precision={precision}", f"--preset={json.dumps(preset)}"]
    name = f"{what} {preset['dataset']} batch {batch} {precision}"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        # Each compiles for a minute or more, on the CPU.
        workers = list(pool.map(lambda command: stack.enter_context(bench.Worker(*command)), (ours, theirs)))
        return bench.measure(name, what, dict(zip(("ours", "torch.compile"), workers, strict=True)), reps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="what experiments.export wrote")
    parser.add_argument("--json", default="build/bench/gpu.json", help="where the numbers go")
    args = parser.parse_args()
    for folder in args.folders:
        if not any((folder / f"{what}.stablehlo.mlir").exists() for what in _WHAT):
            raise SystemExit(f"gpu: {folder} holds no exported train_step or sample_step: see --help")
    bench.report(args.json, (measure_export(folder.resolve(), 5) for folder in args.folders))


if __name__ == "__main__":
    main()
