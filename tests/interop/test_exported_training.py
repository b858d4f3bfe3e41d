"""Training from an export: as `train` trains, resumed bit for bit, and without TensorFlow."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from support.forked_programs import ROOT, run_fork

import diffusion_tf as dtf
from diffusion_tf.data.arrays import array_source
from diffusion_tf.data.in_memory import ImageArray
from diffusion_tf.data.order import EpochShuffle
from diffusion_tf.data.training_images import open_training_images
from diffusion_tf.data_settings import PRESETS_OWN, DataSettings
from diffusion_tf.errors import DivergedError, InputError, PreemptedError
from diffusion_tf.interop import export, exported_training
from diffusion_tf.interop.train_loop import TrainLoop
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.trainer import Trainer
from experiments._flags import preset_arguments

os.environ["JAX_PLATFORMS"] = "cpu"
PRESET = get_preset(
    "digits", image_size=4, batch_size=4, num_timesteps=6, dropout=0.1, random_flip=True, ch_mult=(1,),
    mid_attention=False, warmup_steps=4, num_steps=8, steps_per_loop=4, checkpoint_every=4, sample_every=0,
)  # fmt: skip
IMAGES = np.random.RandomState(0).randint(0, 256, (11, 4, 4, 1)).astype(np.uint8)  # an epoch ends within a call


@pytest.fixture(scope="module")
def trainer():
    return Trainer(PRESET, make_strategy("one_device"))


@pytest.fixture(scope="module")
def exported(trainer, tmp_path_factory):
    """The folder of an exported loop of three steps a call."""
    folder = str(tmp_path_factory.mktemp("export"))
    export.write(folder, "train_loop", PRESET, trainer.state.model, steps_per_call=3)
    return folder


@pytest.fixture(scope="module")
def loop(exported):
    """That loop, compiled for the CPU by JAX."""
    loop = TrainLoop(exported)
    loop.compile()
    return loop


@dataclasses.dataclass
class Notice:
    """A preemption notice from the first look on, or none."""

    reason: str | None = None


def train(loop, path, *, preset=PRESET, notice=None):
    """Trains in `path`, and returns its workdir."""
    exported_training.train_in_workdir(
        loop,
        ImageArray("noise", IMAGES, None, ()),
        str(path),
        preset=preset,
        command="",
        data=PRESETS_OWN,
        make_notice=lambda: contextlib.nullcontext(Notice(notice)),
    )
    return Workdir(str(path))


def checkpoint(workdir, step):
    return safetensors.numpy.load_file(checkpoints.checkpoint_path(workdir.checkpoints, step))


def metrics(workdir):
    """The lines of metrics.jsonl without the speed."""
    lines = workdir.read_metrics()
    return [{name: value for name, value in line.items() if name != "images_per_sec"} for line in lines]


def test_an_exported_run_is_that_of_train(loop, trainer, tmp_path):
    """The same initial weights, images, noise and metrics: equal up to rounding."""
    workdir = train(loop, tmp_path)
    batches = trainer.batches(array_source(IMAGES))
    for line in metrics(workdir):
        sums = trainer.run_steps(batches, tf.constant(4))
        expected = {"loss": sums["loss"] / 4, "grad_norm": sums["grad_norm"] / 4, "param_norm": sums["param_norm"]}
        for name, value in expected.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-5, err_msg=f"{name} of step {line['step']}")
    ours, theirs = checkpoint(workdir, 8), trainer.state.to_arrays()
    assert {n: (a.dtype, a.shape) for n, a in ours.items()} == {n: (a.dtype, a.shape) for n, a in theirs.items()}
    off = np.concatenate([np.abs(ours[name] - array).ravel() for name, array in theirs.items()])
    # Where the gradient is zero, as for biases before normalisation, Adam turns rounding errors into full steps.
    assert np.mean(off < 1e-5) > 0.99
    assert ours["step"] == 8
    trainer.state.restore(checkpoints.checkpoint_path(workdir.checkpoints, 8))
    assert dtf.load(str(tmp_path)).preset == PRESET


def test_a_resumed_run_is_the_uninterrupted_one(loop, tmp_path):
    whole = train(loop, tmp_path / "whole")
    with pytest.raises(PreemptedError, match="SIGTERM: saved step 3, run it again to go on"):
        train(loop, tmp_path / "parts", notice="SIGTERM")
    with pytest.raises(PreemptedError, match="saved step 4"):
        train(loop, tmp_path / "parts", notice="SIGTERM")
    parts = train(loop, tmp_path / "parts")
    paths = [checkpoints.checkpoint_path(workdir.checkpoints, 8) for workdir in (whole, parts)]
    first, second = (pathlib.Path(path).read_bytes() for path in paths)
    assert first == second
    assert metrics(whole) == metrics(parts) and len(metrics(parts)) == 2


def test_an_export_for_more_devices_than_there_are_is_refused(exported, tmp_path):
    manifest = json.loads((pathlib.Path(exported) / "manifest.json").read_text())
    for name in ("program", "weights"):
        manifest[name] = os.path.join(exported, manifest[name])
    write_json(f"{tmp_path}/manifest.json", manifest | {"replicas": 8})
    with pytest.raises(InputError, match="the export is for 8 devices, and there are 1: export with `replicas=1`"):
        TrainLoop(str(tmp_path)).compile()


def test_a_longer_run_goes_on_and_another_recipe_is_refused(loop, tmp_path):
    train(loop, tmp_path)
    longer = dataclasses.replace(PRESET, num_steps=9)
    assert checkpoint(train(loop, tmp_path, preset=longer), 9)["step"] == 9
    with pytest.raises(InputError, match="dropout: 0.5 != 0.1"):
        train(loop, tmp_path, preset=dataclasses.replace(longer, dropout=0.5))


class Diverging:
    """A loop whose loss is NaN from step 5 on."""

    steps_per_call, replicas, shares, text_sha256, init_from = 3, 1, range(1), "", None

    def start(self):
        self.step = 0

    def restore(self, path):
        self.step = int(checkpoints.load(path)["step"])

    def to_arrays(self):
        return {"step": np.asarray(self.step)}

    def put(self, **examples):
        return examples

    def run_steps(self, num_steps, examples):
        losses = np.array([np.nan if self.step + i > 4 else 1.0 for i in range(3)], np.float32)
        self.step += num_steps
        return {"loss": losses, "grad_norm": losses, "param_norm": np.float32(1)}


def test_a_run_that_diverges_goes_back_once(tmp_path):
    preset = dataclasses.replace(PRESET, max_skipped_steps=2, num_steps=20)
    with pytest.raises(DivergedError, match="before step 7: start again in another `workdir`"):
        train(Diverging(), tmp_path, preset=preset)
    assert checkpoints.all_steps(Workdir(str(tmp_path)).checkpoints) == [4]


class Recording(Diverging):
    """A loop that does not diverge, and keeps the examples of its steps."""

    def __init__(self, replicas=1, shares=range(1)):
        self.replicas, self.shares, self.examples = replicas, shares, []

    def run_steps(self, num_steps, examples):
        self.examples.append({name: array[:num_steps] for name, array in examples.items()})
        self.step += num_steps
        return dict.fromkeys(("loss", "grad_norm"), np.ones(3, np.float32)) | {"param_norm": np.float32(1)}

    def seen(self, name):
        return np.concatenate([examples[name] for examples in self.examples])


class Numbered:
    """Labelled images of their own indices, which keeps those that were read."""

    name, classes, shuffle = "numbers", tuple(map(str, range(11))), EpochShuffle((5, 6), 4)

    def __init__(self):
        self.read = []

    def take(self, indices):
        self.read.append(indices)
        return np.broadcast_to(indices[..., None, None, None], (*indices.shape, 4, 4, 1)).astype(np.uint8), indices


def train_on_numbers(loop, path):
    images = Numbered()
    exported_training.train_in_workdir(
        loop,
        images,
        str(path),
        preset=dataclasses.replace(PRESET, num_classes=11),
        command="",
        data=PRESETS_OWN,
        make_notice=lambda: contextlib.nullcontext(Notice()),
    )
    return np.concatenate(images.read)


def test_labels_go_with_their_images(tmp_path):
    loop = Recording()
    train_on_numbers(loop, tmp_path)
    np.testing.assert_array_equal(loop.seen("labels"), loop.seen("images")[..., 0, 0, 0])
    assert Workdir(str(tmp_path)).read_classes() == Numbered.classes


def test_processes_read_their_shares_of_each_batch(tmp_path):
    whole = train_on_numbers(Recording(), tmp_path / "whole")
    shares = [range(1), range(1, 4)]  # of two processes with one and three devices
    read = [train_on_numbers(Recording(4, share), tmp_path / str(share)) for share in shares]
    assert [array.shape for array in read] == [(8, 1), (8, 3)]
    np.testing.assert_array_equal(np.concatenate(read, axis=1), whole)


def test_training_from_an_export_imports_no_tensorflow():
    code = (
        "import sys, diffusion_tf.interop.exported_training, diffusion_tf.data.training_images\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_images_are_read_without_their_held_out_part(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        (tmp_path / f"pictures/{index}.png").write_bytes(tf.io.encode_png(IMAGES[index]).numpy())
    np.savez(tmp_path / "images.npz", images=IMAGES)
    pictures = open_training_images(PRESET, DataSettings(images=f"{tmp_path}/pictures", held_out=0))
    np.testing.assert_array_equal(pictures.images, IMAGES[:4])
    found = open_training_images(PRESET, DataSettings(npz=f"{tmp_path}/images.npz", held_out=0.3)).images
    assert 0 < len(found) < 11 and {image.tobytes() for image in found} < {image.tobytes() for image in IMAGES}
    assert open_training_images(get_preset("digits"), PRESETS_OWN).images.shape == (1618, 8, 8, 1)


def test_a_bad_picture_and_missing_images_are_named(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").write_bytes(tf.io.encode_png(IMAGES[0]).numpy())
    with pytest.raises(InputError, match=r"1\.png cannot be read .*: remove it"):
        open_training_images(PRESET, DataSettings(images=str(tmp_path), held_out=0))
    with pytest.raises(InputError, match="name the training images by `images=FOLDER`, `npz=FILE`"):
        open_training_images(get_preset("cifar10"), PRESETS_OWN)
    np.savez(tmp_path / "images.npz", images=IMAGES, labels=np.arange(11) % 3)
    with pytest.raises(InputError, match="num_classes=2 in the export, and .* has 3 classes"):
        open_training_images(
            dataclasses.replace(PRESET, num_classes=2), DataSettings(npz=f"{tmp_path}/images.npz", held_out=0)
        )


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "cannot read .*manifest.json"),
        ({}, "manifest.json is damaged, or not of this program"),
        ({"what": "train_step"}, "holds the program train_step: write one by `export --what=train_loop`"),
        ({"what": "train_loop", "steps_per_call": 3, "preset": {"ch": -1}}, "is not an export of this version"),
    ],
)
def test_a_folder_without_a_training_loop_is_refused(tmp_path, manifest, message):
    if manifest is not None:
        rest = {"program": "p", "weights": "w", "preset": {}, "arguments": [], "results": []} if manifest else {}
        write_json(f"{tmp_path}/manifest.json", rest | manifest)
    with pytest.raises(InputError, match=message):
        TrainLoop(str(tmp_path))


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit_and_train_goes_on(exported, tmp_path):
    """Real processes, of which those that train from the export cannot import TensorFlow."""
    images = f"{tmp_path}/images.npz"
    np.savez(images, images=IMAGES)
    for name in ("tensorflow", "keras"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def start(run):
        args = [exported, f"--workdir={tmp_path}/{run}", f"--npz={images}", "--num_steps=40"]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments", "train_exported", *args],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    def num_lines():
        path = tmp_path / "parts/metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    assert start("whole").wait() == 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, PreemptedError.exit_code)):
        before, process = num_lines(), start("parts")
        while process.poll() is None and num_lines() < before + 2:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
    assert start("parts").wait() == 0
    paths = [tmp_path / run / "checkpoints/step_00000040.safetensors" for run in ("whole", "parts")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    flags = preset_arguments(dataclasses.replace(PRESET, num_steps=44), get_preset("digits"))
    trained = run_fork("train", f"--workdir={tmp_path}/parts", f"--npz={images}", "--dataset=digits", *flags)
    assert trained.returncode == 0, trained.stderr
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 45, 4))
    assert dtf.load(f"{tmp_path}/parts").sample(2, seed=0).shape == (2, 4, 4, 1)
