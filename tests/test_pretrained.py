"""The trained weights that ship with the package."""

import pathlib

import numpy as np
import pytest

import diffusion_tf as dtf
from diffusion_tf import pretrained
from diffusion_tf.data.digits import load_digits
from diffusion_tf.interop.diffusers import read_diffusers
from diffusion_tf.presets import PRETRAINED
from diffusion_tf.storage import checkpoints
from diffusion_tf.unet import UNet

SHIPPED = pathlib.Path(pretrained.__file__).parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusion_tf/pretrained"


def test_all_weights_together_take_less_than_20_mb():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*.safetensors")) < 20e6


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_are_those_of_the_presets_network_in_half_precision(name):
    preset = dtf.get_preset(name)
    arrays = read_diffusers(str(SHIPPED / name), preset, UNet.from_preset(preset))
    kernels = [array for array_name, array in arrays.items() if array_name.startswith("ema/") and array.ndim > 1]
    assert all(np.array_equal(kernel, kernel.astype(np.float16)) for kernel in kernels)


@pytest.mark.usefixtures("cache")
def test_digits_load_by_name_and_denoise_held_out_digits():
    run = dtf.load("digits")
    assert run.preset == dtf.get_preset("digits")
    images = load_digits("test")[:64] / 127.5 - 1.0
    noise = np.random.default_rng(0).standard_normal(images.shape)
    alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[300]
    x_t = np.sqrt(alphas_cumprod) * images + np.sqrt(1.0 - alphas_cumprod) * noise
    # The best linear denoiser, fitted to the training digits in closed form, has 0.111.
    assert np.mean((run.denoise(x_t, 300) - noise) ** 2) < 0.105


def test_the_first_use_makes_a_run_that_later_uses_find(cache):
    folder = pretrained.run_folder("digits")
    checkpoint = pathlib.Path(checkpoints.find(f"{folder}/checkpoints")[1])
    written = checkpoint.stat().st_mtime_ns
    assert pretrained.run_folder("digits") == folder
    assert pathlib.Path(folder).parent == cache
    assert checkpoint.stat().st_mtime_ns == written


@pytest.mark.usefixtures("cache")
def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("digits").mkdir()
    assert pretrained.resolve("digits") == "digits"
    assert pretrained.resolve("runs/mine") == "runs/mine"
    with pytest.raises(dtf.InputError, match="digits"):
        dtf.load("digits")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(dtf.InputError, match=f"cannot write {tmp_path}/file/diffusion_tf/pretrained"):
        pretrained.run_folder("digits")
