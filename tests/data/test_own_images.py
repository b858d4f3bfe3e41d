"""Images of .npz files, of any TFDS dataset and of tf.data datasets: contents, shapes, splits and labels."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from support.odd_pictures import encoded, picture

from diffusion_tf.data import open_images
from diffusion_tf.data.arrays import array_source, materialize
from diffusion_tf.data.source import ImageReader
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import ConfigError, InputError

IMAGES = np.random.RandomState(0).randint(0, 256, (40, 6, 8, 3)).astype(np.uint8)


def all_images(source):
    return ImageReader(source)(0, source.num_examples)


def labels(source, seed=None):
    return [int(source.label(record)) for record in source.records(seed)]


def own(shape):
    return shape


def write_npz(tmp_path, **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return DataSettings(npz=str(tmp_path / "x.npz"))


@pytest.mark.parametrize("key", ["images", "samples"])
def test_an_npz_file_is_split_into_its_images(tmp_path, key):
    data = write_npz(tmp_path, **{key: IMAGES}, labels=np.arange(40) // 4 * 10)
    train, test = (open_images(data, split, own) for split in ("train", "test"))
    assert train.image_shape == (6, 8, 3) and train.num_examples + test.num_examples == 40 and test.num_examples
    together = {image.tobytes() for source in (train, test) for image in all_images(source)}
    assert together == {image.tobytes() for image in IMAGES}
    assert train.classes == test.classes == tuple(str(10 * label) for label in range(10))
    label_of = {image.tobytes(): index // 4 for index, image in enumerate(IMAGES)}
    for source in (train, test):
        shuffled = [(source.decode(record).numpy().tobytes(), source.label(record)) for record in source.records(3)]
        assert all(label_of[image] == label for image, label in shuffled)


def test_images_of_an_npz_file_get_the_runs_shape(tmp_path):
    data = write_npz(tmp_path, images=IMAGES)
    found = all_images(open_images(data, "train", lambda _: (12, 12, 1)))
    first = PIL.Image.fromarray(IMAGES[0][:, 1:7]).convert("L").resize((12, 12), PIL.Image.Resampling.LANCZOS)
    assert found.shape[1:] == (12, 12, 1) and np.asarray(first).tobytes() in {image.tobytes() for image in found}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "must hold images or samples, .*; there are: pictures uint8"),
        ({"images": IMAGES.astype(np.float32)}, "must hold images .*; there are: images float32"),
        ({"images": IMAGES[0]}, "must hold images"),
        (
            {"images": IMAGES, "labels": np.arange(39)},
            r"labels must be int or str \[40\], .* not int64",
        ),
        (
            {"images": IMAGES, "labels": np.ones(40)},
            r"labels must be int or str \[40\], .* not float64",
        ),
        ({"images": IMAGES[:1]}, "there is one image, and one is held out"),
    ],
)
def test_other_npz_files_are_refused(tmp_path, arrays, message):
    with pytest.raises(ConfigError, match=f"npz={tmp_path}/x.npz:? {message}"):
        open_images(write_npz(tmp_path, **arrays), "train", own)


def prepare_tfds(folder, image_shape, images, file_format="tfrecord"):
    """Prepares a TFDS dataset `shapes` with named labels; the images may be arrays or files."""

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["disc", "square", "star"])
            features = {"image": tfds.features.Image(shape=image_shape), "label": label, "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(images), "validation": self._generate_examples(images[:3])}

        def _generate_examples(self, images):
            for index, image in enumerate(images):
                value = io.BytesIO(image) if isinstance(image, bytes) else image
                yield index, {"image": value, "label": index % 3, "text": "unused"}

    Shapes(data_dir=folder, file_format=file_format).download_and_prepare()


def test_any_tfds_dataset_is_read_with_its_labels(tmp_path):
    prepare_tfds(tmp_path, (6, 8, 3), IMAGES[:7])
    data = DataSettings(tfds="shapes", data_dir=str(tmp_path))
    source = open_images(data, "train", own)
    assert source.image_shape == (6, 8, 3) and source.classes == ("disc", "square", "star")
    label_of = {image.tobytes(): index % 3 for index, image in enumerate(IMAGES[:7])}
    for seed in (None, 5):
        found = {source.decode(record).numpy().tobytes(): int(source.label(record)) for record in source.records(seed)}
        assert found == label_of
    assert open_images(data, "test", own).name == "shapes/1.2.0, validation"
    with pytest.raises(ConfigError, match="tfds=shapes:9.9.9: .* holds only version 1.2.0"):
        open_images(DataSettings(tfds="shapes:9.9.9", data_dir=str(tmp_path)), "train", own)


def test_a_tfds_dataset_of_mixed_sizes_goes_through_the_cache(tmp_path):
    pictures = [picture(index, (20 + 2 * index, 24)) for index in range(5)]
    prepare_tfds(tmp_path, (None, None, 3), [encoded(image) for image in pictures])
    data = DataSettings(
        tfds="shapes:1.2.0", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), resize="stretch"
    )
    for _ in range(2):
        source = open_images(data, "train", lambda own: own if own != (64, 64, 3) else (16, 16, 3))
        wanted = {
            np.asarray(image.resize((16, 16), PIL.Image.Resampling.LANCZOS)).tobytes(): index % 3
            for index, image in enumerate(pictures)
        }
        found = zip(all_images(source), labels(source), strict=True)
        assert {image.tobytes(): label for image, label in found} == wanted


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_every_shard_of_the_cache_has_its_own_part_of_a_tfds_dataset(tmp_path, file_format):
    images = np.random.RandomState(1).randint(0, 256, (150, 6, 8, 3)).astype(np.uint8)  # three shards
    prepare_tfds(tmp_path, (6, 8, 3), images, file_format)
    data = DataSettings(tfds="shapes", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    cached = all_images(open_images(data, "train", lambda _: (6, 8, 1)))
    whole = all_images(open_images(data, "train", own))
    grey = [np.asarray(PIL.Image.fromarray(image).convert("L"))[..., None] for image in whole]
    np.testing.assert_array_equal(cached, grey)


def test_a_small_dataset_is_read_into_memory():
    dataset = tf.data.Dataset.from_tensor_slices(IMAGES)
    images, none = materialize(dataset)
    assert none is None and np.array_equal(images, IMAGES)
    images, found = materialize(dataset.map(lambda image: (image, 3)))
    assert found.tolist() == [3] * 40 and np.array_equal(images, IMAGES)
    for wrong, message in (
        (dataset.repeat(), "images: the dataset is endless"),
        (dataset.batch(4), "images: the dataset must hold images uint8"),
        (dataset.map(lambda image: {"image": image}), "images: the dataset must hold images uint8"),
        (dataset.take(0), "images: the dataset is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            materialize(wrong)


def test_an_array_has_the_labels_that_are_given():
    source = array_source(IMAGES[:3], labels=["b", "a", "b"])
    assert source.classes == ("a", "b") and labels(source) == [1, 0, 1]
    with pytest.raises(InputError, match=r"labels must be int or str \[3\]"):
        array_source(IMAGES[:3], labels=[1, 2])
