"""Importing weights from real files of the authors' program and of diffusers, and refusing other files."""

import json
import math
import pathlib
import pickle
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from support import golden

from diffusion_tf.errors import InputError
from diffusion_tf.interop.diffusers import check_size, diffusers_name, read_diffusers, to_diffusers, write_diffusers
from diffusion_tf.interop.diffusers_config import is_diffusers_folder, preset_from_folder
from diffusion_tf.interop.tf1 import find_prefix, read_tf1, tf1_name
from diffusion_tf.interop.tf1_index import find_blocks
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.training.state import TrainState
from diffusion_tf.unet import UNet

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
DIFFUSERS = json.loads((FIXTURES / "diffusers_small.json").read_text())
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return UNet.from_preset(golden.SMALL)


def relative_error(ours, expected):
    return np.abs(ours - expected).max() / np.abs(expected).max()


def output(model, arrays, group, x, t):
    params = [arrays[f"{group}/{name}"] for name in model.weight_names]
    return model.denoise_fn(params)(x, t)


def tf1_variables(model):
    """The variables of the authors' small checkpoint, drawn as tests/fixtures/README.md describes."""
    weights, rest = np.random.RandomState(4242), np.random.RandomState(790)
    shapes = {golden.tf1_name(v.path): v.shape for v in model.trainable_variables}
    plus_one = lambda name, w: w + np.float32(1) if name.endswith("gamma") else w
    draw = lambda stream, scale, name: (scale * stream.standard_normal(shapes[name])).astype(np.float32)
    variables, order = {}, golden.tf1_order(model)
    for name in order:
        variables[name] = plus_one(name, draw(weights, 0.05, name))
        variables[f"{name}/ExponentialMovingAverage"] = plus_one(name, draw(rest, 0.05, name))
    for name in order:
        variables[f"{name}/Adam"] = draw(rest, 1e-3, name)
        variables[f"{name}/Adam_1"] = (1e-6 * rest.standard_normal(shapes[name]) ** 2).astype(np.float32)
    variables["beta1_power"], variables["beta2_power"] = np.float32(0.9**791), np.float32(0.999**791)
    return {**variables, "global_step": np.int64(790)}


def save_tf1(prefix, variables):
    """Writes variables as tf.train.Saver does."""
    names = sorted(variables)
    tensors = [tf.constant(variables[name]) for name in names]
    shard = f"{prefix}_part"
    tf.raw_ops.SaveV2(prefix=shard, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[shard], destination_prefix=str(prefix))


@pytest.fixture(scope="module")
def tf1_checkpoint(tmp_path_factory, model):
    """The authors' small checkpoint: the index that TF 1.15 wrote, with CRCs of all data, and the data drawn again."""
    prefix = tmp_path_factory.mktemp("tf1") / "model.ckpt-790"
    variables = tf1_variables(model)
    prefix.with_name("model.ckpt-790.index").write_bytes((FIXTURES / "tf1_small.index").read_bytes())
    data = b"".join(np.asarray(variables[name]).tobytes() for name in sorted(variables))
    prefix.with_name("model.ckpt-790.data-00000-of-00001").write_bytes(data)
    return prefix


def test_a_tf1_checkpoint_gives_the_authors_output_and_resumes(tf1_checkpoint, model, tmp_path):
    arrays = read_tf1(str(tf1_checkpoint), model)
    for group, fixture, key in (("params", "unet_small", "output"), ("ema", "ema_small", "output_ema")):
        inputs = golden.load(fixture)
        assert relative_error(output(model, arrays, group, inputs["x"], inputs["t"]), inputs[key]) < 1e-5
    variables = tf1_variables(model)
    for name in model.weight_names:
        for group, suffix in (("adam_m", "/Adam"), ("adam_v", "/Adam_1")):
            np.testing.assert_array_equal(arrays[f"{group}/{name}"], variables[tf1_name(name) + suffix])
    path = checkpoints.save(str(tmp_path), 790, arrays)
    state = TrainState(golden.SMALL, make_strategy("one_device"))
    state.restore(path)
    assert int(state.step) == 790
    for name, array in state.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_tf1_checkpoint_without_moments_starts_from_step_0(model, tmp_path):
    variables = {name: v for name, v in tf1_variables(model).items() if "/Adam" not in name and "power" not in name}
    save_tf1(tmp_path / "model.ckpt", variables)
    arrays = read_tf1(str(tmp_path / "model.ckpt"), model)
    assert arrays["step"] == 0 and not any(arrays[f"adam_v/{name}"].any() for name in model.weight_names)
    name = "down_0_block_0/conv1/kernel"
    np.testing.assert_array_equal(arrays[f"ema/{name}"], variables[f"{tf1_name(name)}/ExponentialMovingAverage"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {n: a for n, a in v.items() if "Exponential" not in n}, "model.ckpt has no EMA weights"),
        (
            lambda v: {n: a for n, a in v.items() if n != "global_step"},
            "it has no global_step; there are: beta1_power, .* 570 others",
        ),
        (
            lambda v: {n: a for n, a in v.items() if n != "model/conv_out/b/ExponentialMovingAverage"},
            "holds another network: model/conv_out/b/ExponentialMovingAverage is missing",
        ),
        (lambda v: {**v, "model/class_emb/W": np.float32(1)}, "holds another network: model/class_emb/W is unknown"),
        (
            lambda v: {**v, "model/conv_in/W": np.zeros((3, 3, 3, 64), np.float32)},
            r"holds another network: model/conv_in/W is float32 \(3, 3, 3, 64\), not float32 \(3, 3, 3, 32\)",
        ),
        (lambda v: {**v, "global_step": np.int64(-1)}, "global_step is -1"),
        (
            lambda v: {**v, "model/conv_in/b": np.zeros(32, np.float64)},
            r"conv_in/b is float64 .*, not float32",
        ),
    ],
)
def test_other_tf1_checkpoints_are_refused(model, tmp_path, change, message):
    save_tf1(tmp_path / "model.ckpt", change(tf1_variables(model)))
    with pytest.raises(InputError, match=message):
        read_tf1(str(tmp_path / "model.ckpt"), model)


def test_damaged_tf1_checkpoints_are_refused(tf1_checkpoint, model, tmp_path):
    names = [f"model.ckpt-790.{part}" for part in ("index", "data-00000-of-00001")]
    index, data = (tf1_checkpoint.with_name(name).read_bytes() for name in names)
    changed = data[:1000] + b"?" + data[1001:]
    for content, message in (
        ((index, data[:-5000]), "is damaged or incomplete"),
        ((index, changed), "is damaged or incomplete"),
        ((index[:5000], data), "is not a TF1 checkpoint"),
        ((b"", data), "is not a TF1 checkpoint"),
    ):
        for name, part in zip(names, content, strict=True):
            (tmp_path / name).write_bytes(part)
        with pytest.raises(InputError, match=message) as error:
            read_tf1(str(tmp_path / "model.ckpt-790"), model)
        assert "\n" not in str(error.value)
    with pytest.raises(
        InputError, match=r"source=.*nothing is not a TF1 checkpoint: give its prefix.*there are: model.ckpt-790"
    ):
        read_tf1(str(tmp_path / "nothing"), model)


def test_an_index_with_sound_checksums_and_another_entry_is_refused(tf1_checkpoint, model, tmp_path):
    """TensorFlow's own reader ends the process at an entry that it cannot parse."""
    pywrap = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    content = tf1_checkpoint.with_name("model.ckpt-790.index").read_bytes()
    (block,) = find_blocks(content)
    for place, byte in ((40, 0xFF), (20, 0x7F), (3000, 0x80), (block[1] - 1, 0xFF)):
        data = bytearray(content)
        data[block[0] + place] = byte
        end = sum(block) + 1
        data[end : end + 4] = pywrap.masked_crc32c(bytes(data[block[0] : end])).to_bytes(4, "little")
        (tmp_path / "model.ckpt-790.index").write_bytes(data)
        with pytest.raises(InputError, match=r"model.ckpt-790"):
            read_tf1(str(tmp_path / "model.ckpt-790"), model)


def test_a_tf1_checkpoint_is_found_by_its_files_and_its_folder(tmp_path):
    prefix = tmp_path / "model.ckpt-790"
    for name in ("index", "data-00000-of-00001", "meta"):
        prefix.with_name(f"{prefix.name}.{name}").touch()
    state = tmp_path / "checkpoint"
    for source in (prefix, *tmp_path.iterdir(), tmp_path, f"{tmp_path}/"):
        assert pathlib.Path(find_prefix(str(source))) == prefix
    (tmp_path / "model.ckpt-80.index").touch()
    for source in (tmp_path, state, tmp_path / "model.ckpt"):
        with pytest.raises(InputError, match=r"give its prefix, .*; there are: model.ckpt-790, model.ckpt-80"):
            find_prefix(str(source))
    state.write_text('model_checkpoint_path: "/elsewhere/model.ckpt-80"')  # as after a move
    for source in (tmp_path, state):
        assert pathlib.Path(find_prefix(str(source))) == tmp_path / "model.ckpt-80"
    for text in ('model_checkpoint_path: "model.ckpt-7"', "{", "\xff"):
        state.write_text(text)
        with pytest.raises(InputError, match="there are: model.ckpt-790, model.ckpt-80"):
            find_prefix(str(tmp_path))
    with pytest.raises(InputError, match="there are: none"):
        find_prefix(str(tmp_path / "nothing/model.ckpt"))


@pytest.mark.slow
def test_the_full_cifar10_network_is_imported_and_exported(tmp_path):
    model, variables = UNet.from_preset(get_preset("cifar10")), {"global_step": np.int64(5)}
    for variable in model.trainable_variables:
        name = golden.tf1_name(variable.path)
        stream = np.random.RandomState(zlib.crc32(name.encode()))
        w = stream.standard_normal(variable.shape).astype(np.float32) * np.float32(0.02)
        variables[f"{name}/ExponentialMovingAverage"] = w + np.float32(1) if name.endswith("gamma") else w
        variables[name] = np.zeros_like(w)
    save_tf1(tmp_path / "model.ckpt-5", variables)
    arrays, fixture = read_tf1(str(tmp_path / "model.ckpt-5"), model), golden.load("full_forward")
    x = np.random.RandomState(1).standard_normal([1, 32, 32, 3]).astype(np.float32)
    for t in (37, 911):
        assert relative_error(output(model, arrays, "ema", x, np.array([t])), fixture[f"cifar10_t{t}"]) < 5e-5
    weights = [arrays[f"ema/{name}"] for name in model.weight_names]
    write_diffusers(str(tmp_path / "exported"), get_preset("cifar10"), model.weight_names, weights)
    again = read_diffusers(str(tmp_path / "exported"), get_preset("cifar10"), model)
    for name in model.weight_names:
        np.testing.assert_array_equal(again[f"ema/{name}"], arrays[f"ema/{name}"])


def diffusers_weights(scale=0.02):
    """The weights of the small folders, drawn as tests/fixtures/README.md describes."""
    weights = {}
    for key, shape in DIFFUSERS["shapes"].items():
        stream = np.random.RandomState(zlib.crc32(key.encode()))
        w = stream.standard_normal(shape).astype(np.float32) * np.float32(scale)
        weights[key] = w + np.float32(1) if "norm" in key and key.endswith("weight") else w
    return weights


def save_diffusers(folder, kind, weights, **changes):
    """Writes one of the small folders, with `changes` to the configuration of its network."""
    for name, config in DIFFUSERS[kind].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("scheduler_config.json") or path.name == "model_index.json":
            path.write_text(json.dumps(config))
            continue
        config = {field: value for field, value in {**config, **changes}.items() if value != "absent"}
        path.write_text(json.dumps(config))
        if kind == "diffusers_small_hub":
            weights = {DIFFUSERS["old_names"].get(key, key): w for key, w in weights.items()}
        safetensors.numpy.save_file(weights, path.with_name(WEIGHTS))
    return str(folder)


@pytest.mark.parametrize("kind", ["diffusers_small", "diffusers_small_hub"])
@pytest.mark.parametrize(("scale", "key"), [(0.02, "y"), (0.1, "y_scale0p1")])
def test_a_diffusers_folder_gives_the_output_of_diffusers(kind, scale, key, model, tmp_path):
    fixture = golden.load("diffusers_small")
    arrays = read_diffusers(save_diffusers(tmp_path, kind, diffusers_weights(scale)), golden.SMALL, model)
    for group in ("params", "ema"):
        assert relative_error(output(model, arrays, group, fixture["x"], fixture["t"]), fixture[key]) < 5e-5
    assert arrays["step"] == 0 and not any(arrays[f"adam_m/{name}"].any() for name in model.weight_names)


def test_an_exported_folder_equals_one_of_diffusers(model, tmp_path):
    arrays = read_diffusers(
        save_diffusers(tmp_path / "theirs", "diffusers_small", diffusers_weights()), golden.SMALL, model
    )
    weights = [arrays[f"ema/{name}"] for name in model.weight_names]
    write_diffusers(str(tmp_path / "ours"), golden.SMALL, model.weight_names, weights)
    written = safetensors.numpy.load_file(tmp_path / "ours/unet" / WEIGHTS)
    assert written.keys() == DIFFUSERS["shapes"].keys()
    for key, w in diffusers_weights().items():
        np.testing.assert_array_equal(written[key], w)
    for name, config in DIFFUSERS["diffusers_small"].items():
        ours = json.loads((tmp_path / "ours" / name).read_text())
        differing = {field for field in ours if ours[field] != config[field]}
        assert differing == {"_diffusers_version"}, name
    again = read_diffusers(str(tmp_path / "ours"), golden.SMALL, model)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(InputError, match="ours already exists: name a new folder"):
        write_diffusers(str(tmp_path / "ours"), golden.SMALL, model.weight_names, weights)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"beta_schedule": "quad"}, "beta_schedule=quad is unknown to diffusers, which knows linear"),
        ({"model_mean_type": "xprev"}, "model_mean_type=xprev is unknown to diffusers, which knows eps, xstart"),
        ({"model_var_type": "learned", "loss_type": "kl"}, "model_var_type=learned is unknown to diffusers"),
    ],
)
def test_a_preset_that_diffusers_cannot_express_is_not_exported(preset, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_diffusers(str(tmp_path / "exported"), get_preset("digits", **preset), [], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": "absent"}, r"attention_head_dim=8, .* has null \(`attention_head_dim`\)"),
        ({"attention_head_dim": 64}, None),  # one head
        ({"attention_head_dim": [8]}, r"attention_head_dim=\[8\], and"),
        ({"norm_eps": "absent"}, r"norm_eps=1e-05, .* has 1e-06 \(`norm_eps`\)"),
        ({"add_attention": False}, r"add_attention=false, .* has true \(`mid_attention`\)"),
        ({"block_out_channels": [64, 64]}, r"=\[64, 64\], .* has \[32, 64\] \(`ch` and `ch_mult`\)"),
        ({"act_fn": "gelu"}, 'act_fn="gelu"'),
        ({"act_fn": "swish"}, None),
        ({"sample_size": 32}, r"sample_size=32, .* has 16 \(`image_size` and `image_width`\)"),
        ({"sample_size": [16, 32]}, r"sample_size=\[16, 32\], .* has 16"),
        ({"sample_size": [16, 16]}, None),
        ({"sample_size": None}, None),  # any size
        ({"down_block_types": ["DownBlock2D"] * 2}, r"down_block_types.*\(`attn_resolutions`\)"),
        ({"use_flux": True}, "has use_flux=true, which this program does not know"),
        ({"dropout": 0.5, "_name_or_path": "google/ddpm"}, None),
    ],
)
def test_the_configuration_of_the_network_is_checked(changes, message, model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights(), **changes)
    if message is None:
        read_diffusers(folder, golden.SMALL, model)
    else:
        with pytest.raises(InputError, match=message):
            read_diffusers(folder, golden.SMALL, model)


# Changes to the configuration of the small network, with which diffusers itself made diffusers_variants.npz.
VARIANTS = {
    "defaults": dict.fromkeys(
        ("attention_head_dim", "norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding"), "absent"
    ),
    "no_mid": {"add_attention": False, "act_fn": "swish", "attention_head_dim": 16, "norm_eps": 0.1},
    "wide": {"sample_size": [16, 32]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_the_network_gives_the_output_of_diffusers_and_is_exported_again(variant, tmp_path):
    expected, inputs = golden.load("diffusers_variants")[variant], golden.load("diffusers_small")
    x = inputs["x"] if variant != "wide" else np.random.RandomState(1).standard_normal((2, 16, 32, 3)).astype("f")
    weights = diffusers_weights(0.1)
    if variant == "no_mid":
        weights = {key: w for key, w in weights.items() if "mid_block.attentions" not in key}
    folder = save_diffusers(tmp_path / "theirs", "diffusers_small", weights, **VARIANTS[variant])
    preset = preset_from_folder(folder)
    variant_model = UNet.from_preset(preset)
    arrays = read_diffusers(folder, preset, variant_model)
    assert relative_error(output(variant_model, arrays, "ema", x, inputs["t"]), expected) < 5e-5
    exported = str(tmp_path / "ours")
    names = variant_model.weight_names
    write_diffusers(exported, preset, names, [arrays[f"ema/{name}"] for name in names])
    assert preset_from_folder(exported) == preset
    written = safetensors.numpy.load_file(tmp_path / "ours/unet" / WEIGHTS)
    assert written.keys() == weights.keys()
    for key, w in weights.items():
        np.testing.assert_array_equal(written[key], w)


def test_a_network_for_any_size_takes_the_size_that_is_asked_for(tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights(), sample_size=None)
    with pytest.raises(InputError, match="image_size is required: .*config.json has sample_size=null"):
        preset_from_folder(folder)
    preset = preset_from_folder(folder, image_size=32, image_width=16)
    assert preset.image_shape == (32, 16, 3) and preset.attn_resolutions == (16,)


def test_the_configuration_of_the_scheduler_is_checked(model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    path = tmp_path / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"variance_type": "fixed_small"}, r'variance_type="fixed_small", .* has "fixed_large" \(`model_var_type`\)'),
        ({"beta_schedule": "squaredcos_cap_v2"}, r'"squaredcos_cap_v2", .* has "linear" \(`beta_schedule`\)'),
        ({"prediction_type": "v_prediction"}, r"`model_mean_type`"),
        ({"num_train_timesteps": 500}, r"num_train_timesteps=500, .* has 1000 \(`num_timesteps`\)"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            read_diffusers(folder, golden.SMALL, model)
    path.write_text("{")
    with pytest.raises(InputError, match=r"scheduler_config.json is not JSON"):
        read_diffusers(folder, golden.SMALL, model)
    read_diffusers(str(tmp_path / "unet"), golden.SMALL, model)  # a UNet2DModel alone


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler", "variance_type": "absent", "set_alpha_to_one": True}, None),
        ({"_diffusers_version": "9.9", "_name_or_path": "x", "dynamic_thresholding_ratio": 0.5}, None),
        ({"clip_sample_range": 1, "trained_betas": None, "tensor_format": "pt", "predict_epsilon": True}, None),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
            '_class_name="FlowMatchEulerDiscreteScheduler": only DDPMScheduler and DDIMScheduler can be read',
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}, "=.DPMSolverMulti"),
        ({"_class_name": "absent"}, "_class_name=null"),
        ({"_class_name": ["DDPMScheduler"]}, r'_class_name=."DDPMScheduler".: only'),
        ({"clip_sample": False}, "clip_sample=false, and samples are drawn here with true"),
        ({"clip_sample": 1}, "clip_sample=1, and samples are drawn here with true"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0, and samples are drawn here with 1.0"),
        ({"clip_sample_range": math.nan}, "clip_sample_range=NaN"),
        ({"thresholding": True}, "thresholding=true"),
        ({"timestep_spacing": "trailing"}, 'timestep_spacing="trailing"'),
        ({"steps_offset": 1}, "steps_offset=1"),
        ({"timestep_values": [3, 2, 1]}, r"timestep_values=.3, 2, 1."),
        ({"predict_epsilon": False}, "predict_epsilon=false"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=true"),
        ({"trained_betas": [1e-4] * 1000}, r"trained_betas=.0.0001, .*\.\.\., and the preset"),
        ({"num_train_timesteps": "1000"}, 'num_train_timesteps="1000"|must be a whole number'),
        ({"beta_start": True}, "beta_start"),
        ({"shift": 1.0}, "has shift=1.0, which this program does not know"),
        ({"use_karras_sigmas": False}, "has use_karras_sigmas=false, which this program does not know"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "variance_type": "absent"}, "set_alpha_to_one"),
        ({"_class_name": "DDIMScheduler"}, 'variance_type="fixed_large", which this program does not know'),
    ],
)  # fmt: skip
def test_every_field_of_a_scheduler_agrees_or_is_refused_by_name(config, message, model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    path = tmp_path / "scheduler/scheduler_config.json"
    config = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({field: value for field, value in config.items() if value != "absent"}))
    for read in (lambda: read_diffusers(folder, golden.SMALL, model), lambda: preset_from_folder(folder)):
        if message is None:
            read()
            continue
        with pytest.raises(InputError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, '="UNet2DConditionModel": only UNet2DModel can be read'),
        ({"use_flux": False}, "has use_flux=false, which this program does not know"),
        ({"layers_per_block": True}, "layers_per_block=true|num_res_blocks=True: must be"),
        ({"sample_size": 16.5}, "sample_size=16.5|image_size=16.5: must be a whole"),
        ({"sample_size": [16, 16, 16]}, r"sample_size=.16, 16, 16.|no preset describes"),
        ({"freq_shift": 2}, "freq_shift=2"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels|no preset describes"),
        ({"in_channels": 10**9}, "in_channels|channels=1000000000: must be 64 at most"),
    ],
)
def test_every_field_of_a_network_agrees_or_is_refused_by_name(config, message, model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights(), **config)
    for read in (lambda: read_diffusers(folder, golden.SMALL, model), lambda: preset_from_folder(folder)):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_a_pipeline_with_other_parts_is_refused(model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    index = json.loads((tmp_path / "model_index.json").read_text())
    for change, message in (
        ({"_class_name": "LDMPipeline"}, '_class_name="LDMPipeline": only DDPMPipeline and DDIMPipeline can be read'),
        ({"vqvae": ["diffusers", "VQModel"]}, r'model_index.json has vqvae=\["diffusers", "VQModel"\], which this'),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "model_index.json has scheduler=.*Flow"),
        ({"unet": ["custom", "UNet2DModel"]}, "model_index.json has unet=.*: only UNet2DModel of diffusers"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        for read in (lambda: read_diffusers(folder, golden.SMALL, model), lambda: preset_from_folder(folder)):
            with pytest.raises(InputError, match=message):
                read()


def test_a_scheduler_that_is_missing_is_not_the_default_one(model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    (tmp_path / "scheduler/scheduler_config.json").rename(tmp_path / "scheduler/config.json")
    for read in (lambda: read_diffusers(folder, golden.SMALL, model), lambda: preset_from_folder(folder)):
        with pytest.raises(InputError, match="scheduler_config.json: .*scheduler holds config.json"):
            read()


def test_unet_ema_beside_unet_holds_the_ema_weights(model, tmp_path):
    save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    ema = {key: w + np.float32(0.5) for key, w in diffusers_weights().items()}
    notes = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 500, "update_after_step": 0}
    notes |= {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    save_diffusers(tmp_path / "ema", "diffusers_small", ema, **notes)
    (tmp_path / "ema/unet").rename(tmp_path / "unet_ema")
    both = read_diffusers(str(tmp_path), golden.SMALL, model)
    kernel = diffusers_weights()["conv_in.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(both["params/conv_in/kernel"], kernel)
    np.testing.assert_array_equal(both["ema/conv_in/kernel"], kernel + np.float32(0.5))
    only_ema = read_diffusers(str(tmp_path / "unet_ema"), golden.SMALL, model)
    np.testing.assert_array_equal(only_ema["params/conv_in/kernel"], both["ema/conv_in/kernel"])
    assert is_diffusers_folder(str(tmp_path)) and is_diffusers_folder(str(tmp_path / "unet_ema"))
    (tmp_path / "unet_ema/config.json").write_text('{"_class_name": "UNet2DModel", "attention_head_dim": null}')
    with pytest.raises(
        InputError, match="unet_ema/config.json has norm_eps=1e-05|unet_ema/config.json has freq_shift=0"
    ):
        read_diffusers(str(tmp_path), golden.SMALL, model)


def test_a_network_larger_than_its_file_takes_no_memory(tmp_path):
    widths = {"block_out_channels": [512, 1024]}
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights(), **widths)
    with pytest.raises(InputError, match=r"network: it has .* weights, and the network of config.json .* at least"):
        check_size(folder, preset_from_folder(folder))


@pytest.mark.parametrize("kinds", ["bfloat16", "float16", "float32 bfloat16 float16"])
def test_weights_in_half_precision_become_float32_exactly(kinds, model, tmp_path):
    dtypes = [tf.as_dtype(kind).as_numpy_dtype for kind in kinds.split()]
    stored = {key: w.astype(dtypes[i % len(dtypes)]) for i, (key, w) in enumerate(diffusers_weights().items())}
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    (tmp_path / "unet" / WEIGHTS).write_bytes(safetensors.numpy.save(stored))
    arrays = read_diffusers(folder, golden.SMALL, model)
    for name in model.weight_names:
        theirs = to_diffusers(name, arrays[f"ema/{name}"])
        assert theirs.dtype == np.float32
        expected = stored[diffusers_name(name, levels=2)].astype(np.float64)  # NumPy's or ml_dtypes' conversion
        np.testing.assert_array_equal(theirs.astype(np.float64), expected)


def test_a_file_of_the_hubs_fp16_variant_is_read_where_the_plain_one_is_missing(model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    plain = tmp_path / "unet" / WEIGHTS
    variant = plain.with_suffix(".fp16.safetensors")
    variant.write_bytes(safetensors.numpy.save({k: (2 * w).astype(np.float16) for k, w in diffusers_weights().items()}))
    kernel = diffusers_weights()["conv_in.weight"]

    def read():
        return to_diffusers("conv_in/kernel", read_diffusers(folder, golden.SMALL, model)["ema/conv_in/kernel"])

    np.testing.assert_array_equal(read(), kernel)
    plain.unlink()
    np.testing.assert_array_equal(read(), (2 * kernel).astype(np.float16))
    check_size(folder, preset_from_folder(folder))


def test_files_that_do_not_hold_the_networks_weights_are_refused(model, tmp_path):
    folder = save_diffusers(tmp_path, "diffusers_small", diffusers_weights())
    path = tmp_path / "unet" / WEIGHTS
    whole = path.read_bytes()
    header_size = int.from_bytes(whole[:8], "little")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps({"conv_in.weight": 1}))
    whole_numbers = {key: w.astype(np.int32) for key, w in diffusers_weights().items()}
    missing = {key: w for key, w in diffusers_weights().items() if key != "conv_in.bias"}
    both = {**diffusers_weights(), "mid_block.attentions.0.query.bias": np.zeros(64, np.float32)}
    for content, message in (
        (whole[:-1], "is not a safetensors file, or is damaged .it has"),
        (whole[: header_size + 8], "is not a safetensors file, or is damaged .it has"),
        (whole[:8] + b"?" + whole[9:], "its header does not describe arrays"),
        ((tmp_path / "model.zip").read_bytes(), "it is a pickle, which may run code"),
        (pickle.dumps(missing, protocol=4), "it is a pickle, which may run code"),
        (safetensors.numpy.save(whole_numbers), r"is int32 .*, not float32"),
        (safetensors.numpy.save(missing), "holds another network: conv_in.bias is missing"),
        (safetensors.numpy.save(both), "holds layers of attention under both old and new names"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            read_diffusers(folder, golden.SMALL, model)
        assert "\n" not in str(error.value)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.bin is a pickle, .*: save the weights as"):
        read_diffusers(folder, golden.SMALL, model)
    path.with_suffix(".bin").rename(path.with_suffix(".fp32.safetensors"))
    there = "diffusion_pytorch_model.safetensors: .*unet holds config.json, diffusion_pytorch_model.fp32.safetensors"
    with pytest.raises(InputError, match=rf"cannot read .*{there}"):
        read_diffusers(folder, golden.SMALL, model)
    with pytest.raises(InputError, match=r"cannot read .*nothing/config.json: there is no such folder"):
        read_diffusers(str(tmp_path / "nothing"), golden.SMALL, model)


def test_classes_are_the_embedding_of_diffusers(tmp_path):
    """Diffusers looks up row i of `class_embedding.weight` [N, 4 ch] and adds it to the embedding of t."""
    preset = get_preset("digits", num_classes=3, ch_mult=(2,))
    classes = UNet.from_preset(preset)
    golden.assign_random_weights(classes, np.random.RandomState(0))
    write_diffusers(str(tmp_path / "x"), preset, classes.weight_names, [v.numpy() for v in classes.trainable_variables])
    config = json.loads((tmp_path / "x/unet/config.json").read_text())
    assert (config["class_embed_type"], config["num_class_embeds"]) == (None, 3)
    table = safetensors.numpy.load_file(tmp_path / "x/unet" / WEIGHTS)["class_embedding.weight"]
    one_hot = np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(classes.class_embedding(one_hot), table, rtol=1e-6)
    assert preset_from_folder(str(tmp_path / "x")).num_classes == 3
    arrays = read_diffusers(str(tmp_path / "x"), preset, classes)
    np.testing.assert_array_equal(arrays["ema/class_embedding/kernel"], table)
    plain = get_preset("digits", ch_mult=(2,))
    model = UNet.from_preset(plain)
    with pytest.raises(InputError, match=r"num_class_embeds=3, and the preset's .* has null \(`num_classes`\)"):
        read_diffusers(str(tmp_path / "x"), plain, model)
