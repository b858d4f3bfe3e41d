"""The programs as a user runs them: exit codes, one line per error, and the files that they write."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from support import inception_files
from support.forked_programs import ROOT, run_fork, start_fork

from diffusion_tf.compression import bitstream
from diffusion_tf.data.digits import load_digits
from diffusion_tf.presets import Preset
from diffusion_tf.storage.workdir import Workdir

TFRECORD = "tests/fixtures/stylegan2_4x4.tfrecords"
PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
TINY = "--num_steps=4 --steps_per_loop=2 --checkpoint_every=2 --sample_every=0 --batch_size=8 --num_timesteps=4".split()
TINY.append("--ch_mult=1")


def run_main(*options, args):
    """`python -m experiments ARGS` in its own process."""
    command = [sys.executable, *options, "-m", "experiments", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run_process(program, *args):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("program", "args", "message"),
    [
        ("train", ["--workdir=w", "--dataset=mnist"], "--dataset=mnist: choose one of digits, cifar10"),
        ("train", ["--workdir=w", "--learning_rate=-1"], "--learning_rate=-1.0: must be greater than 0"),
        ("train", ["--workdir=w", "--learning_rate=0"], "--learning_rate=0.0: must be greater than 0"),
        ("train", ["--workdir=w", "--dataset=cifar10", "--data_dir=/nowhere"], "--data_dir=/nowhere holds no prepared"),
        ("train", ["--workdir=w", "--dataset=lsun_cat", "--tfrecord=tests/fixtures"], "tests/fixtures is a folder"),
        ("train", ["--workdir=w", "--dataset=lsun_cat", f"--tfrecord={TFRECORD}"], "images are (4, 4, 3)"),
        ("train", ["--workdir=w", "--beta_schedule=cosine"], "linear"),
        ("train", ["--workdir=w", "--atn_resolutions=4"], "atn_resolutions"),
        ("train", ["--workdir=w", "--attn_resolutions=5"], "--attn_resolutions=5 never occurs"),
        ("train", [], "--workdir is required"),
        ("train", ["--workdir=/proc/nothing/here"], "cannot write /proc/nothing/here/lock"),
        ("sample", ["--workdir=w", "--out=samples.npz"], "--workdir=w holds no run"),
        ("sample", ["--workdir=w"], "--out is required, or --png"),
        ("sample", ["--pretrained=digits", "--workdir=w", "--png=x.png"], "give one of --workdir and --pretrained"),
        ("likelihood", ["--workdir=w"], "--workdir=w holds no run"),
        ("import_checkpoint", ["--workdir=w"], "give one of --source, to import, and --export_diffusers, to export"),
        ("import_checkpoint", ["--workdir=w", "--source=a", "--format=diffusers"], "cannot read a/config.json"),
        ("compress", ["--workdir=w"], "the first argument must be one of: encode, decode"),
        ("compress", ["decode", "more", "--workdir=w"], "unknown argument more: flags start with --"),
        ("train_exported", ["x", "y", "--workdir=w"], "unknown argument y: flags start with --"),
        ("train_exported", ["tests", "--workdir=w"], "cannot read tests/manifest.json"),
    ],
)
def test_bad_input_gets_one_line(program, args, message):
    result = run_fork(program, *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0 and len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{program}: ") and message in lines[0]
    assert not (ROOT / "w").exists()


def run_without_tensorflow(folder, *args):
    """`python -m experiments ARGS`, where importing TensorFlow or Keras fails."""
    for name in ("tensorflow", "keras"):
        (folder / f"{name}.py").write_text("raise AssertionError('imported')")
    return subprocess.run(
        [sys.executable, "-m", "experiments", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "args",
    [
        ["train"],
        ["train", "--workdir="],
        ["train", "--workdir=w", "--ch_mult=0"],
        ["train", "--workdir=w", "--sample_every=7"],
        ["sample", "--workdir=w"],
        ["sample", "--workdir=w", "--out=s.npz", "--encode=s.npz"],
        ["sample", "--workdir=w", "--out=s", "--inpaint=x.png"],
        ["neighbors", "--workdir=w", "--num_samples=9"],
        ["doctor", "--workdir=w", "--num_images=1"],
        ["doctor", "--workdir=w", "--out=doctor.md"],
        ["evaluate", "--workdir=w", "--features=vgg"],
        ["evaluate", "--workdir=w", "--eval_every=5"],
        ["likelihood", "--workdir=w", "--strategy=multi_worker"],
        ["compress", "--workdir=w"],
        ["compress", "encode", "--workdir=w", "--out=o"],
        ["import", "--workdir=w"],
        ["export", "--what=sampler", "--out=o", "--batch_size=3"],
        ["figures", "--workdir=w", "--figure=all"],
        ["train_exported", "--workdir=w"],
        ["train_exported", "x", "--npz=a", "--images=b", "--workdir=w"],
    ],
)
def test_a_mistake_in_a_flag_is_found_before_tensorflow_is_imported(tmp_path, args):
    result = run_without_tensorflow(tmp_path, *args)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "imported" not in result.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_complete_and_needs_no_tensorflow(program, tmp_path):
    result = run_without_tensorflow(tmp_path, program, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m experiments.{program}" in result.stdout
    assert "--workdir" in result.stdout or program == "tpu_report"  # which has no run
    if program == "train":
        for field in dataclasses.fields(Preset):
            assert f"{field.name}:" in result.stdout, field.name


def test_programs_are_listed_and_started_by_name():
    """In fresh processes, since the list must not take the seconds that TensorFlow's import takes."""
    listed = run_main("-X", "importtime", args=["--help"])
    assert listed.returncode == 0 and "| tensorflow" not in listed.stderr
    for program in PROGRAMS:
        assert re.search(rf"^  {program} +[A-Z].*\.$", listed.stdout, re.MULTILINE), listed.stdout
    assert run_main(args=[]).stdout == listed.stdout
    unknown = run_main(args=["trian", "--workdir=w"])
    assert unknown.returncode == 1 and unknown.stderr.startswith("diffusion-tf: there is no program trian; choose one")
    refused = run_main(args=["import", "--workdir=w"])
    assert refused.returncode == 1
    assert refused.stderr == "import_checkpoint: give one of --source, to import, and --export_diffusers, to export\n"


def test_every_flag_reaches_the_configuration():
    changed = {
        "image_size": 16, "image_width": 32, "channels": 3, "random_flip": True, "ch": 64, "ch_mult": [1, 2, 2],
        "num_res_blocks": 2, "num_classes": 5, "label_dropout": 0.3, "random_shift": 1,
        "attn_resolutions": [4, 8], "attention_head_dim": 16, "mid_attention": False, "norm_eps": 1e-5,
        "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "dropout": 0.25, "precision": "bfloat16",
        "num_timesteps": 50, "beta_schedule": "quad", "beta_start": 0.001,
        "beta_end": 0.3, "model_mean_type": "xstart", "model_var_type": "learned", "loss_type": "kl",
        "learning_rate": 0.5, "batch_size": 3, "num_steps": 7, "warmup_steps": 9, "grad_clip": 2.5, "ema_decay": 0.5,
        "seed": 11, "steps_per_loop": 10, "checkpoint_every": 20, "keep_checkpoints": 5, "keep_every": 40,
        "sample_every": 30, "max_skipped_steps": 3,
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Preset)} - {"dataset"}
    as_flag = lambda v: ",".join(map(str, v)) if isinstance(v, list) else v
    result = run_fork("train", "--dry_run", *(f"--{name}={as_flag(value)}" for name, value in changed.items()))
    assert result.returncode == 0, result.stderr
    config, _, parameters = result.stdout.partition("parameters: ")
    assert json.loads(config) == {"dataset": "digits", **changed}
    assert int(parameters.replace(",", "")) > 1e6


def test_train_resume_and_sample(tmp_path):
    workdir = tmp_path / "run"
    trained = run_process("train", f"--workdir={workdir}", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "4/4" in trained.stderr and "images/s" in trained.stderr
    again = run_fork("train", f"--workdir={workdir}", *TINY)
    assert again.returncode == 0, again.stderr
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
    refused = run_fork("train", f"--workdir={workdir}", *TINY, "--dropout=0.5")
    assert refused.returncode == 1 and "dropout: 0.5 != 0.0" in refused.stderr
    assert Workdir(workdir).read_preset().dropout == 0.0

    outputs = []
    for name, args in (("a", ["--batch_size=3"]), ("b", ["--checkpoint=4"]), ("c", ["--checkpoint=2", "--seed=1"])):
        out, png = tmp_path / f"{name}.npz", tmp_path / f"{name}.png"
        result = run_fork("sample", f"--workdir={workdir}", "--num_samples=7", f"--out={out}", f"--png={png}", *args)
        assert result.returncode == 0, result.stderr
        assert png.read_bytes().startswith(b"\x89PNG")
        with np.load(out, allow_pickle=False) as archive:
            outputs.append(archive["samples"])
    assert outputs[0].shape == (7, 8, 8, 1) and outputs[0].dtype == np.uint8
    assert np.abs(outputs[0].astype(int) - outputs[1]).max() <= 1
    assert not np.array_equal(outputs[1], outputs[2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run of digits with four timesteps."""
    workdir = tmp_path_factory.mktemp("run")
    result = run_fork("train", f"--workdir={workdir}", *TINY)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.slow
def test_pictures_are_changed_and_a_folder_of_samples_goes_on(trained, tmp_path):
    picture, mask, folder = tmp_path / "x.png", tmp_path / "mask.png", tmp_path / "folder"
    digit = load_digits()[0]
    painted = np.zeros((8, 8), bool)
    painted[2:5, 3:] = True
    Image.fromarray(digit[..., 0]).save(picture)
    Image.fromarray(np.where(painted, 128, 127).astype(np.uint8)).save(mask)
    sample = lambda *args: run_fork("sample", f"--workdir={trained}", *args)
    inpaint = [f"--inpaint={picture}", f"--mask={mask}", f"--out={folder}", "--jump_length=2", "--batch_size=4"]

    assert sample(*inpaint, "--num_samples=5").returncode == 0
    first = [(folder / f"{i:06d}.png").read_bytes() for i in range(5)]
    refused = sample(*inpaint, "--num_samples=9")
    assert refused.returncode == 1 and "holds 5 of these samples: add --resume to go on" in refused.stderr
    other = sample(*inpaint, "--num_samples=9", "--resume", "--seed=1")
    assert other.returncode == 1 and "holds samples of seed 0, not 1: name another folder" in other.stderr
    (folder / "000003.png").write_bytes(b"damaged")
    assert sample(*inpaint, "--num_samples=9", "--resume").returncode == 0
    assert [(folder / f"{i:06d}.png").read_bytes() for i in range(5)] == first
    samples = np.load(folder / "samples.npz")["samples"]
    assert samples.shape == (9, 8, 8, 1) and sorted(path.name for path in folder.iterdir())[8:] == [
        "000008.png", "samples.json", "samples.npz",
    ]  # fmt: skip
    for i, image in enumerate(samples):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), image[..., 0])
        np.testing.assert_array_equal(image[~painted], digit[~painted])
    assert len(np.unique(samples.reshape(9, -1), axis=0)) == 9

    # Both pictures of a file in turn, one of each by default.
    np.savez(tmp_path / "two.npz", samples=load_digits()[:2])
    for out, args in (("a", []), ("b", ["--num_samples=4"])):
        changed = sample(f"--start_from={tmp_path}/two.npz", f"--out={tmp_path}/{out}.npz", "--strength=0.25", *args)
        assert changed.returncode == 0, changed.stderr
    a, b = (np.load(tmp_path / f"{name}.npz")["samples"].astype(int) for name in "ab")
    assert a.shape == (2, 8, 8, 1) and np.abs(b[:2] - a).max() <= 1
    distances = np.abs(b[:, None] - load_digits()[:2].astype(int)).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == [0, 1, 0, 1]


@pytest.mark.slow
def test_neighbors_give_a_verdict(trained, tmp_path):
    few = ["--num_samples=40", "--sampler=ddim", "--sampler_steps=2", f"--out={tmp_path}/drawn.json"]
    np.savez(tmp_path / "copies.npz", samples=load_digits("train")[:40])
    copies = [f"--samples={tmp_path}/copies.npz", "--features=digits"]
    for args, verdict in ((few, "farther"), (copies, "copies")):
        result = run_fork("neighbors", f"--workdir={trained}", *args)
        assert result.returncode == 0 and result.stdout.startswith("The samples "), result.stderr
        path = next(line for line in result.stdout.splitlines() if line.startswith("numbers: ")).partition(" ")[2]
        record = json.loads(pathlib.Path(path).read_text())
        assert record["verdict"] == verdict and record["num_held_out"] == 179
        assert pathlib.Path(path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert record["copies"] == 40 and max(record["distances"]) == 0.0
    report = run_fork("report", f"--workdir={trained}", f"--out={tmp_path}/report.md")
    assert report.returncode == 0 and record["sentence"] in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_run_exported_to_diffusers_and_imported_again_samples_and_encodes(trained, tmp_path):
    few = ["--sampler=ddim", "--sampler_steps=2"]
    exported, imported, small = tmp_path / "exported", tmp_path / "imported", ["--num_timesteps=4", "--ch_mult=1"]
    for program, args in (
        ("import_checkpoint", [f"--workdir={trained}", f"--export_diffusers={exported}"]),
        (
            "import_checkpoint",
            [f"--workdir={imported}", "--format=diffusers", f"--source={exported}", "--dataset=digits", *small],
        ),
        ("sample", [f"--workdir={imported}", "--num_samples=6", f"--out={tmp_path}/drawn.npz", *few]),
        ("sample", [f"--workdir={imported}", f"--encode={tmp_path}/drawn.npz", f"--out={tmp_path}/encoded.npz", *few]),
    ):
        result = run_fork(program, *args)
        assert result.returncode == 0, result.stderr
    drawn, encoded = (np.load(tmp_path / f"{name}.npz") for name in ("drawn", "encoded"))
    assert encoded["latents"].shape == drawn["samples"].shape and encoded["latents"].dtype == np.float32
    assert encoded["samples"].shape == drawn["samples"].shape and "latents" not in drawn


def test_measurements_and_the_report_agree(trained):
    best = trained / "checkpoints/best/evaluation.json"
    for program, args in (
        ("likelihood", ["--num_images=20"]),
        ("likelihood", ["--num_images=20", "--num_timesteps_estimate=2"]),
        ("rate_distortion", ["--num_images=20"]),
        ("evaluate", ["--follow", "--num_samples=30"]),
        ("evaluate", ["--num_samples=30", "--sampler=dpm_solver++", "--sampler_steps=2"]),
        ("evaluate", ["--num_samples=30", "--features=pixels", "--metrics=fid", "--reference=test"]),
        ("report", []),
    ):
        result = run_fork(program, f"--workdir={trained}", *args)
        assert result.returncode == 0, result.stderr
    numbers = {path.stem: json.loads(path.read_text()) for path in trained.glob("*.json")}
    likelihood, curve = numbers["likelihood_test"], numbers["rate_distortion_test"]
    terms = (likelihood[f"{term}_bits_per_dim"] for term in ("prior", "middle", "decoder"))
    assert abs(sum(terms) - likelihood["bits_per_dim"]) < 1e-6
    assert len(likelihood["terms_bits_per_dim"]) == 4 and likelihood["num_images"] == 20
    rate_and_decoder = curve["table"][0]["rate_bits_per_dim"] + curve["decoder_bits_per_dim"]
    assert abs(rate_and_decoder - likelihood["bits_per_dim"]) < 1e-6
    assert numbers["likelihood_test_estimate"]["num_timesteps_estimate"] == 2
    assert numbers["evaluation"]["frechet_pixels"] > 0 and "fid" not in numbers["evaluation"]
    lines = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 4]
    assert [(line["sampler"], line["sampler_steps"]) for line in lines[2:]] == [("dpm_solver++", 2), ("ancestral", 4)]
    chosen = min(lines[:2], key=lambda line: line["frechet_digits"])
    assert json.loads(best.read_text()) == {**chosen, "best_by": "frechet_digits"}
    assert (trained / f"checkpoints/best/step_{chosen['step']:08d}.safetensors").exists()
    assert not list((trained / "checkpoints/evaluating").glob("*/*"))
    again = run_fork("evaluate", f"--workdir={trained}", "--num_samples=30", "--checkpoint=2")
    assert again.returncode == 0 and "sampl" not in again.stderr, again.stderr  # no sample is drawn twice
    assert len((trained / "evaluations.jsonl").read_text().splitlines()) == 4
    assert (trained / "rate_distortion_test.csv").read_text().count("\n") == 5
    report = (trained / "report.md").read_text()
    assert f"{likelihood['bits_per_dim']:.4f}" in report and "frechet_pixels" in report
    assert "| dpm_solver++ | 2 |" in report and "Not measured" in report  # nothing was compressed
    curve = json.loads((trained / "rate_distortion_test.json").read_text())["curve"]
    assert [row["reverse_process_time"] for row in curve] == [1, 2, 3, 4]
    for picture in ("report", "likelihood_test", "rate_distortion_test"):
        assert (trained / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_colour_images_are_scored_with_inception(tmp_path):
    inception_files.save_model(tmp_path / "inception")
    data = ["--dataset=lsun_cat", f"--tfrecord={TFRECORD}", "--image_size=4", "--ch=32", "--attn_resolutions="]
    workdir = tmp_path / "run"
    result = run_fork("train", f"--workdir={workdir}", *data, "--num_res_blocks=1", "--warmup_steps=0", *TINY)
    assert result.returncode == 0, result.stderr
    evaluate = ["evaluate", f"--workdir={workdir}", f"--tfrecord={TFRECORD}", f"--inception={tmp_path}/inception"]
    samples = ["sample", f"--workdir={workdir}", "--num_samples=12", f"--out={tmp_path}/samples.npz"]
    for args in ([*evaluate, "--num_samples=12"], samples, [*evaluate, f"--samples={tmp_path}/samples.npz"]):
        result = run_fork(*args)
        assert result.returncode == 0, result.stderr
    lines = (workdir / "evaluations.jsonl").read_text().splitlines()
    drawn, of_file = json.loads(lines[0]), json.loads((workdir / "evaluation.json").read_text())
    assert len(lines) == 1 and drawn["fid"] > 0 and drawn["inception_score"] >= 1
    # The same images, but rounded to integers.
    assert abs(of_file["fid"] / drawn["fid"] - 1) < 0.05 and of_file["samples"].endswith("samples.npz")


@pytest.mark.slow
def test_every_figure_is_made(trained, tmp_path):
    args = [f"--workdir={trained}", "--count=9", "--chains=3", "--num_samples=12"]
    result = run_fork("figures", *args, "--figure=all", f"--out={tmp_path}/figures")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "figures/index.html").read_text()
    names = ["samples", "progressive", "shared_latents", "interpolation", "coarse_to_fine", "neighbors"]
    for name in (*names, "progressive_quality", "animation"):
        picture = "animation.gif" if name == "animation" else f"{name}.png"
        assert f'src="{picture}"' in page and (tmp_path / "figures" / picture).stat().st_size > 500
        assert json.loads((tmp_path / f"figures/{name}.json").read_text())["step"] == 4
    again = run_fork("figures", *args, "--figure=coarse_to_fine", f"--out={tmp_path}/again.png")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "figures/coarse_to_fine.png").read_bytes()
    assert json.loads((tmp_path / "again.json").read_text())["t"] == [4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_compressed_files_decode_to_their_images(trained, tmp_path):
    files, out = tmp_path / "files", tmp_path / "out"
    trained_run = [f"--workdir={trained}", "--chunk_bits=12"]  # shorter searches
    args = [*trained_run, "--num_images=3", "--num_table_images=20"]
    encoded = run_fork("compress", "encode", *args, "--split=test", "--lossless", f"--out={files}")
    assert encoded.returncode == 0, encoded.stderr
    record = json.loads((trained / "compression_test.json").read_text())
    assert [row["reverse_process_time"] for row in record["table"]][-1] == 4
    sizes = [path.stat().st_size for path in sorted(files.glob("*.dtfc"))]
    assert 8 * np.mean(sizes) / 64 == pytest.approx(record["lossless_bits_per_dim"])
    assert (trained / "compression_test.png").read_bytes().startswith(b"\x89PNG")

    images = load_digits("test")[:3]
    Image.fromarray(images[2][..., 0]).save(tmp_path / "digit.png")
    np.savez(tmp_path / "digits.npz", images=images)
    few = [*trained_run, f"--images={tmp_path}/digits.npz", f"--out={tmp_path}/few"]
    assert run_fork("compress", "encode", *few, "--target_bits_per_dim=1.7").returncode == 0
    few_sizes = [path.stat().st_size for path in sorted((tmp_path / "few").glob("*.dtfc"))]
    assert len(few_sizes) == 3 and all(12 <= size <= 13 for size in few_sizes)
    args = [*trained_run, f"--images={tmp_path}/digit.png", "--target_rmse=300", f"--out={files}"]
    one = run_fork("compress", "encode", *args)
    assert one.returncode == 0 and (files / "digit.dtfc").stat().st_size == 12  # no step is needed

    whole = (files / "image_00001.dtfc").read_bytes()
    (files / "cut.dtfc").write_bytes(whole[:-1])
    decoded = run_fork("compress", "decode", f"--workdir={trained}", f"--source={files}", f"--out={out}")
    assert decoded.returncode == 0, decoded.stderr
    for i, image in enumerate(images):  # lossless, so the decoder's predictions are the encoder's
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"image_{i:05d}.png")), image[..., 0])
    for name in ("cut", "digit"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (8, 8)


@pytest.mark.slow
def test_compress_refuses_what_it_cannot_do(trained, tmp_path):
    out = tmp_path / "out"
    few = [f"--workdir={trained}", "--split=test", f"--out={out}", "--target_bits_per_dim=1.4"]
    refused = run_fork("compress", "encode", *few)
    assert refused.returncode == 1 and "1.5 at least" in refused.stderr and not out.exists()
    (tmp_path / "other.dtfc").write_bytes(bitstream.pack(b"8 others", 24, 0, b""))
    refused = run_fork("compress", "decode", f"--workdir={trained}", f"--source={tmp_path}/other.dtfc", f"--out={out}")
    assert refused.returncode == 1 and "other.dtfc was made by another model" in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--figure=interpolation", "--t=5", "--out=a.png"], "--t=5 must be from 0 to the run's 4 steps"),
        (["--figure=interpolation", "--t=4", "--out=a.png", "--index_b=179"], "there is no image 179 in scikit-learn"),
        (["--figure=interpolation", "--t=4", "--out=a.png", "--source_a=docs/demo.png"], "docs/demo.png (its size is"),
    ],
)
def test_bad_input_of_a_figure_gets_one_line(trained, args, message):
    result = run_fork("figures", f"--workdir={trained}", *args)
    lines = [line for line in result.stderr.strip().splitlines() if "absl::InitializeLog" not in line]
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("figures: ") and message in lines[0]
    assert not (ROOT / "a.png").exists()


@pytest.mark.slow
def test_a_killed_likelihood_is_resumed(trained, tmp_path):
    args = [f"--workdir={trained}", "--num_images=60", "--batch_size=2", "--seed=9"]
    before = set((trained / "partial").glob("*/part_*")) if (trained / "partial").exists() else set()
    killed = start_fork("likelihood", *args, f"--out={tmp_path}/killed.json")
    while killed.process.is_alive() and len(set((trained / "partial").glob("*/part_*.npz")) - before) < 2:
        time.sleep(0.01)
    killed.process.kill()
    killed.wait()
    (folder,) = {path.parent for path in set((trained / "partial").glob("*/part_*.npz")) - before}
    done = {path: path.stat().st_mtime_ns for path in folder.glob("part_*.npz")}
    assert not (tmp_path / "killed.json").exists() and 2 <= len(done) < 30
    resumed = run_fork("likelihood", *args, f"--out={tmp_path}/killed.json")
    assert resumed.returncode == 0, resumed.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    for part in folder.glob("part_*"):
        part.unlink()
    whole = run_fork("likelihood", *args, f"--out={tmp_path}/whole.json")
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "killed.json").read_text() == (tmp_path / "whole.json").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num_samples=2"], "--metrics=inception_score needs at least 10 samples, and there are 2"),
        (["--best_by=fid"], "--best_by=fid: choose from frechet_digits, classifier_score_digits"),
        (["--out=scores.txt"], "--out=scores.txt must end in .json"),
        (
            ["--features=inception", "--inception=/nowhere.pb"],
            "--inception=/nowhere.pb does not exist: give a local copy",
        ),
        (["--samples=setup.py"], "setup.py is not an .npz file"),
        (["--checkpoint=3"], "no checkpoint of step 3; there are: 2, 4"),
    ],
)
def test_bad_input_of_an_evaluation_gets_one_line(trained, args, message):
    result = run_fork("evaluate", f"--workdir={trained}", *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("evaluate: ") and message in lines[0]
