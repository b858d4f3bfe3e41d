"""Images of other shapes than the paper's: a recipe is chosen, and every program goes through with it."""

import json

import numpy as np
import pytest
from support.forked_programs import run_fork

import diffusion_tf as dtf
from diffusion_tf.interop import export
from diffusion_tf.interop.diffusers_config import preset_from_folder
from diffusion_tf.recipes import choose_preset

TINY = {"num_res_blocks": 1, "num_steps": 4, "num_timesteps": 4, "batch_size": 8}


def waves(count, height, width):
    """Smooth grey images, uint8 [N, H, W, 1]."""
    rng = np.random.default_rng(0)
    phase, slope = rng.uniform(0, 6, (count, 1, 1)), rng.uniform(0.1, 0.3, (count, 1, 1))
    y, x = np.mgrid[:height, :width]
    return (127 + 100 * np.sin(slope * (x + 2 * y) + phase)).astype(np.uint8)[..., None]


def test_programs_of_wide_images_have_their_shape():
    preset = choose_preset((32, 64, 1), 60, **TINY, ch_mult=(1,))
    program = export.build("sample_step", preset)
    assert program.results[0].shape == (8, 32, 64, 1)
    assert "tensor<8x32x64x1xf32>" in program.stablehlo()


def run(folder, program, *args):
    result = run_fork(program, *args, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wide_grey_images_go_through_every_program(tmp_path):
    images = waves(40, 32, 64)
    np.savez(tmp_path / "waves.npz", images=images)
    recipe = [f"--{name}={value}" for name, value in {**TINY, "ch_mult": "1,2"}.items()]
    table = run(tmp_path, "train", "--workdir=run", "--npz=waves.npz", "--held_out=0.2", *recipe)
    assert "of 32x64x1" in table and "heights 32-16" in table
    assert "warning: " in table and "images are few, and a network may copy them" in table
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["image_size"], config["image_width"], config["channels"]) == (32, 64, 1)

    run(tmp_path, "sample", "--workdir=run", "--num_samples=3", "--out=s.npz", "--png=s.png")
    samples = np.load(tmp_path / "s.npz")["samples"]
    assert samples.shape == (3, 32, 64, 1) and samples.dtype == np.uint8
    run(tmp_path, "likelihood", "--workdir=run", "--num_images=2")
    run(tmp_path, "rate_distortion", "--workdir=run", "--num_images=2")
    run(tmp_path, "figures", "--workdir=run", "--figure=all", "--out=figures")
    run(tmp_path, "export", "--workdir=run", "--what=denoiser", "--out=denoiser")
    manifest = json.loads((tmp_path / "denoiser/manifest.json").read_text())
    assert [result["shape"][1:] for result in manifest["results"]] == [[32, 64, 1]]
    run(tmp_path, "import_checkpoint", "--workdir=run", "--export_diffusers=diffusers")
    assert preset_from_folder(str(tmp_path / "diffusers")).image_shape == (32, 64, 1)
    run(tmp_path, "report", "--workdir=run")

    trained = dtf.load(str(tmp_path / "run"))
    assert np.isfinite(trained.bits_per_dim(images[:2])).all()
    files = trained.encode(images[:2], lossless=True, chunk_bits=6, table_images=images)
    np.testing.assert_array_equal(trained.decode(files), images[:2])


@pytest.mark.slow
def test_28_pixels_train_on_three_levels(tmp_path):
    preset = choose_preset((28, 28, 1), 40, **TINY)
    assert preset.ch_mult == (1, 2, 2)
    trained = dtf.train(preset, str(tmp_path / "run"), images=waves(40, 28, 28))
    assert trained.sample(2).shape == (2, 28, 28, 1)


@pytest.mark.slow
def test_a_run_fits_in_the_minutes_that_it_is_given(tmp_path):
    np.savez(tmp_path / "waves.npz", images=waves(40, 16, 16))
    fit = ["--npz=waves.npz", "--fit=minutes:2"]
    table = run(tmp_path, "train", "--workdir=run", *fit)
    preset = json.loads((tmp_path / "run/config.json").read_text())
    assert f"{preset['num_steps']:,} steps of {preset['batch_size']} images" in table
    assert "as measured on this machine" in table and "GiB estimated, on a CPU" in table
    again = run(tmp_path, "train", "--workdir=run", *fit)  # the run keeps its recipe, and has ended
    assert "as measured" not in again


@pytest.mark.slow
def test_a_gpu_takes_from_the_batch(tmp_path):
    np.savez(tmp_path / "waves.npz", images=waves(40, 64, 64))
    small, large = (run(tmp_path, "train", "--npz=waves.npz", f"--fit=gpu{size}g", "--dry_run") for size in (1, 80))
    assert "steps of 16 images" in small and "steps of 64 images" in large
    assert "not predicted" in large
