"""Feature networks: Inception's preprocessing, files with its signature, and the digits classifier."""

import numpy as np
import pytest
import tensorflow as tf
from support import golden, inception_files

from diffusion_tf.data.digits import load_digit_labels, load_digits
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import RESIZES
from diffusion_tf.evaluation.feature_networks import digits_network, inception_input, inception_network, pixels_network
from diffusion_tf.runtime.strategies import make_strategy

GOLDEN = golden.load("metrics")


@pytest.mark.parametrize("jit_compile", [True, False])
def test_inception_input_matches_tf1(jit_compile):
    """The fixture holds every seventh pixel of TF1's resize."""
    ours = tf.function(inception_input, jit_compile=jit_compile)(tf.constant(GOLDEN["resize_in"]))
    assert ours.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(ours[:, ::7, ::7], GOLDEN["resize_out"], atol=1e-5)
    grey = GOLDEN["resize_in"][..., :1]
    np.testing.assert_array_equal(inception_input(tf.constant(grey)), inception_input(tf.repeat(grey, 3, axis=-1)))


@pytest.mark.parametrize("kind", ["saved_model", "frozen_graph"])
def test_inception_file_gives_its_outputs(kind, tmp_path):
    path = tmp_path / kind
    if kind == "saved_model":
        inception_files.save_model(path)
    else:
        inception_files.save_frozen_graph(path)
    network = inception_network(str(path), make_strategy("one_device"))
    pixels = tf.constant(np.random.RandomState(1).uniform(0, 255, (5, 32, 32, 3)), tf.float32)
    expected = inception_files.classify(inception_input(pixels))
    outputs = tf.function(network.apply, jit_compile=True)(pixels)
    assert outputs["features"].shape == (5, 24) and outputs["logits"].shape == (5, 8)
    np.testing.assert_allclose(outputs["features"], np.reshape(expected["pool_3"], [5, 24]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert (network.name, network.resize) == ("inception", "TF1 bilinear to 299")


def test_the_published_graph_takes_many_images_and_gives_logits_without_bias(tmp_path):
    inception_files.save_classify_image(tmp_path / "classify_image_graph_def.pb")
    network = inception_network(str(tmp_path / "classify_image_graph_def.pb"), make_strategy("one_device"))
    pixels = tf.constant(np.random.RandomState(1).uniform(0, 255, (5, 32, 32, 3)), tf.float32)
    expected = inception_files.classify(inception_input(pixels))
    outputs = tf.function(network.apply, jit_compile=True)(pixels)
    np.testing.assert_allclose(outputs["features"], np.reshape(expected["pool_3"], [5, 24]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


def test_the_resize_of_another_program_can_be_chosen(tmp_path):
    """`pytorch_fid` has half-pixel centres: enlarged by a whole number, a picture stays as it is in the middle."""
    inception_files.save_frozen_graph(tmp_path / "inception.pb")
    networks = {
        resize: inception_network(str(tmp_path / "inception.pb"), make_strategy("one_device"), resize)
        for resize in RESIZES
    }
    assert [network.resize for network in networks.values()] == ["TF1 bilinear to 299", "PyTorch bilinear to 299"]
    pixels = tf.constant(np.random.RandomState(1).uniform(0, 255, (1, 23, 23, 3)), tf.float32)  # 299 = 13 * 23
    enlarged = inception_input(pixels, "pytorch_fid")
    np.testing.assert_allclose(enlarged[:, 6::13, 6::13], pixels / 127.5 - 1, atol=1e-5)
    np.testing.assert_allclose(inception_input(pixels, "tf1")[:, ::13, ::13], pixels / 128 - 1, atol=1e-5)
    features = [network.apply(pixels)["features"] for network in networks.values()]
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_digest_depends_on_the_contents_only(tmp_path):
    inception_files.save_frozen_graph(tmp_path / "a.pb")
    (tmp_path / "b.pb").write_bytes((tmp_path / "a.pb").read_bytes())
    strategy = make_strategy("one_device")
    digests = {inception_network(str(tmp_path / name), strategy).sha256 for name in ("a.pb", "b.pb")}
    assert len(digests) == 1
    with (tmp_path / "b.pb").open("ab") as file:
        file.write(tf.compat.v1.GraphDef(versions={"producer": 1}).SerializeToString())
    assert inception_network(str(tmp_path / "b.pb"), strategy).sha256 not in digests


def test_bad_inception_files_are_refused_by_name(tmp_path):
    strategy = make_strategy("one_device")
    with pytest.raises(InputError, match=r"inception=.*nowhere does not exist: give a local copy, `inception=FOLDER`"):
        inception_network(str(tmp_path / "nowhere"), strategy)
    (tmp_path / "text.pb").write_text("no graph")
    with pytest.raises(InputError, match=r"text.pb is no Inception network \(not a frozen graph\)"):
        inception_network(str(tmp_path / "text.pb"), strategy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is no Inception network"):
        inception_network(str(tmp_path / "empty"), strategy)
    inception_files.save_model(tmp_path / "headless", outputs=("pool_3",))
    with pytest.raises(InputError, match="headless has no output named logits; named outputs: pool_3"):
        inception_network(str(tmp_path / "headless"), strategy)
    inception_files.save_unnamed(tmp_path / "unnamed")
    with pytest.raises(InputError, match="unnamed has no output named logits or pool_3; named outputs: none"):
        inception_network(str(tmp_path / "unnamed"), strategy)
    inception_files.save_frozen_graph(tmp_path / "other.pb", outputs=("features", "classes"))
    with pytest.raises(InputError, match="other.pb has no output named logits or pool_3; named outputs: none"):
        inception_network(str(tmp_path / "other.pb"), strategy)


def test_a_graph_that_does_not_run_is_refused_by_name(tmp_path):
    inception_files.save_frozen_graph(tmp_path / "graph.pb")
    sound = tf.compat.v1.GraphDef.FromString((tmp_path / "graph.pb").read_bytes())

    def change(changed, **fields):
        graph = tf.compat.v1.GraphDef()
        graph.CopyFrom(sound)
        (node,) = (node for node in graph.node if node.name == changed)
        for field, value in fields.items():
            setattr(node, field, value)
        return graph.SerializeToString()

    for content in (
        change("pool_3/shape", op="Placeholder"),  # depends on another input
        change("matmul", op="NoSuchOperation"),
        change("logits", op="Shape"),
        change("Relu", name="matmul"),
        sound.SerializeToString()[:-30],
    ):
        (tmp_path / "graph.pb").write_bytes(content)
        with pytest.raises(InputError, match=r"graph.pb is no Inception network") as error:
            inception_network(str(tmp_path / "graph.pb"), make_strategy("one_device"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [True, False])
def test_batch_norm_of_the_published_graph_runs(scale, tmp_path):
    """TensorFlow 2 does not run that operation itself."""
    inception_files.save_frozen_graph(tmp_path / "old.pb", batch_norm=True, scale=scale)
    network = inception_network(str(tmp_path / "old.pb"), make_strategy("one_device"))
    pixels = tf.constant(np.random.RandomState(1).uniform(0, 255, (2, 16, 16, 3)), tf.float32)
    normalised = inception_files.batch_norm(inception_input(pixels), scale)
    expected = np.reshape(inception_files.classify(normalised)["pool_3"], [2, 24])
    outputs = tf.function(network.apply, jit_compile=True)(pixels)
    np.testing.assert_allclose(outputs["features"], expected, rtol=1e-4, atol=1e-4)


def test_unreachable_handle_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"inception=http://localhost:9/i cannot be fetched .*give a local copy"):
        inception_network("http://localhost:9/i", make_strategy("one_device"))


def test_digits_classifier_is_accurate():
    network = digits_network()
    outputs = network.apply(tf.constant(load_digits("test"), tf.float32))
    accuracy = np.mean(np.argmax(outputs["logits"], axis=1) == load_digit_labels("test"))
    assert accuracy > 0.93
    assert outputs["features"].shape == (179, 64) and outputs["pixels"].shape == (179, 64)
    assert digits_network().sha256 == network.sha256


def test_pixels_network_returns_the_pixels():
    pixels = tf.constant(load_digits()[:3], tf.float32)
    outputs = pixels_network((8, 8, 1)).apply(pixels)
    np.testing.assert_allclose(outputs["features"] * 255.0, np.reshape(pixels, [3, 64]), rtol=1e-6)
    assert outputs.keys() == {"features"}
    with pytest.raises(InputError, match="features=pixels is for small images"):
        pixels_network((256, 256, 3))
