"""Image sources: contents, order and damaged files."""

import dataclasses
import itertools
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorboard.summary.writer.record_writer import masked_crc32c

from diffusion_tf.data import conditional_preset, data_paths, open_source
from diffusion_tf.data.arrays import array_source
from diffusion_tf.data.digits import load_digit_labels, load_digits
from diffusion_tf.data.order import shuffle_buffer_size
from diffusion_tf.data.record_files import check_lengths
from diffusion_tf.data.source import ImageReader, label_reader, training_batches
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import get_preset

DIGITS = get_preset("digits")
SMALL_IMAGES = get_preset("lsun_church", image_size=16, ch_mult=(1, 2), attn_resolutions=(8,))
TINY_TFRECORD = pathlib.Path(__file__).parent.parent / "fixtures" / "stylegan2_4x4.tfrecords"


def write_tfrecord(path, images):
    """Writes uint8 [C, H, W] as StyleGAN's dataset_tool does."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image in images.transpose(0, 3, 1, 2):
            feature = {
                "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
                "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


@pytest.fixture
def images():
    return np.random.RandomState(0).randint(0, 256, (10, 16, 16, 3)).astype(np.uint8)


def batches(source, count, *, start_step=0, batch_size=4, per_replica=None, seed=0, **kwargs):
    dataset = training_batches(
        source, batch_size=batch_size, per_replica=per_replica or batch_size, seed=seed, start_step=start_step, **kwargs
    )
    return np.stack(list(dataset.take(count).as_numpy_iterator()))


def rows(images):
    return sorted(image.tobytes() for image in images.reshape(-1, *images.shape[-3:]))


def test_digits_come_from_scikit_learn():
    digits = load_digits()
    assert digits.shape == (1797, 8, 8, 1) and digits.dtype == np.uint8
    assert digits.max() == 255 and len(np.unique(digits)) == 17
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1618, 179)
    assert rows(np.concatenate([train, test])) == rows(digits)


def test_a_reader_keeps_the_order_of_a_split(tmp_path, images):
    source = open_source(DIGITS, "test")
    assert source.num_examples == 179
    read = ImageReader(source)
    for first, count in ((170, 9), (0, 100), (100, 50)):
        np.testing.assert_array_equal(read(first, count), load_digits("test")[first : first + count])
    with pytest.raises(InputError, match="scikit-learn digits, test ends after 179 images, but more were expected"):
        read(150, 30)
    write_tfrecord(tmp_path / "a.tfrecords", images[:6])
    write_tfrecord(tmp_path / "b.tfrecords", images[6:])
    source = open_source(SMALL_IMAGES, "test", DataSettings(tfrecord=str(tmp_path / "*.tfrecords")))
    np.testing.assert_array_equal(ImageReader(source)(4, 5), images[4:9])


def test_labels_match_the_digits():
    digits, labels = load_digits("test"), load_digit_labels("test")
    means = np.stack([load_digits("train")[load_digit_labels("train") == label].mean(axis=0) for label in range(10)])
    nearest = np.argmin(((digits[:, None] - means) ** 2).sum(axis=(2, 3, 4)), axis=1)
    assert (nearest == labels).mean() > 0.85


def test_an_epoch_contains_each_image_once():
    source = open_source(DIGITS)
    assert source.num_examples == 1618
    two_epochs = batches(source, 2 * 2, batch_size=809)
    assert rows(two_epochs[:2]) == rows(two_epochs[2:]) == rows(load_digits("train"))
    assert not np.array_equal(two_epochs[:2], two_epochs[2:])


def test_the_order_depends_on_seed_and_step_only(tmp_path, images):
    write_tfrecord(tmp_path / "a.tfrecords", images)
    source = open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(tmp_path / "*.tfrecords")))
    whole = batches(source, 12)  # several epochs, whose ends lie within batches
    np.testing.assert_array_equal(batches(source, 12), whole)
    for start_step in (1, 2, 5, 11):
        np.testing.assert_array_equal(batches(source, 12 - start_step, start_step=start_step), whole[start_step:])
    assert not np.array_equal(batches(source, 12, seed=1), whole)


def test_replicas_and_workers_share_the_global_batch():
    source = open_source(DIGITS)
    whole = batches(source, 5, batch_size=16)
    by_replica = batches(source, 20, batch_size=16, per_replica=4)
    np.testing.assert_array_equal(by_replica.reshape(whole.shape), whole)
    workers = [batches(source, 5, batch_size=16, per_replica=8, worker=w, workers=2) for w in range(2)]
    np.testing.assert_array_equal(np.concatenate(workers, axis=1), whole)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_read_only_their_own_records_of_the_same_batches(tmp_path, workers):
    images = np.random.RandomState(0).randint(0, 256, (600, 16, 16, 3)).astype(np.uint8)
    for name, some in (("a", images[:350]), ("b", images[350:360]), ("c", images[360:])):
        write_tfrecord(tmp_path / f"{name}.tfrecords", some)
    content = bytearray((tmp_path / "a.tfrecords").read_bytes())
    content[len(content) // 2] ^= 1  # a pixel of a record that is read as the one before it
    (tmp_path / "a.tfrecords").write_bytes(content)
    settings = DataSettings(tfrecord=str(tmp_path / "*.tfrecords"), skip_bad_records=1)
    source, read = open_source(SMALL_IMAGES, "train", settings), []

    def spy(place):
        with tf.control_dependencies([tf.py_function(lambda place: read.append(int(place)), [place], [])]):
            return source.read(place)

    start = 145  # five steps before the second epoch
    shares, all_read = [], []
    for worker in range(workers):
        read.clear()
        spied = dataclasses.replace(source, read=spy)
        shares.append(batches(spied, 8, start_step=start, per_replica=4 // workers, worker=worker, workers=workers))
        all_read.append(list(read))
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), batches(source, 8, start_step=start))
    stream = np.concatenate([list(source.places(tf.constant(e, tf.int64)).as_numpy_iterator()) for e in range(2)])
    for own, worker in zip(all_read, range(workers), strict=True):
        mine = stream[4 * start :].reshape(-1, workers, 4 // workers)[:, worker].ravel()
        assert 8 * 4 // workers <= len(own) and set(own) <= set(mine), "a record of another worker, or of the past"


def test_all_tfrecord_shards_are_read(tmp_path, images):
    write_tfrecord(tmp_path / "s-00.tfrecords", images[:3])
    write_tfrecord(tmp_path / "s-01.tfrecords", images[3:])
    source = open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(tmp_path / "s-*.tfrecords")))
    assert source.num_examples == 10
    assert rows(batches(source, 5, batch_size=2)) == rows(images)


def test_a_file_of_stylegan2s_tool_is_read():
    preset = get_preset("lsun_church", image_size=4, ch_mult=(1,), attn_resolutions=(4,))
    source = open_source(preset, "train", DataSettings(tfrecord=str(TINY_TFRECORD)))
    assert source.num_examples == 24
    means = batches(source, 6).mean(axis=(0, 1, 2, 3))
    record = next(tf.data.TFRecordDataset(str(TINY_TFRECORD)).as_numpy_iterator())
    example = tf.train.Example.FromString(record)
    chw = np.frombuffer(example.features.feature["data"].bytes_list.value[0], np.uint8).reshape(3, 4, 4)
    assert chw.transpose(1, 2, 0).tobytes() in rows(batches(source, 6))
    assert (means > 10).all()


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def tfds_folder(request, tmp_path_factory):
    """A prepared TFDS cifar10 of ten images, and the images."""
    folder = tmp_path_factory.mktemp("tfds") / "a[1]*"  # not a glob
    pixels = np.random.RandomState(1).randint(0, 256, (10, 32, 32, 3)).astype(np.uint8)
    examples = lambda: ((f"{i}", {"id": f"{i}", "image": image, "label": i}) for i, image in enumerate(pixels))
    builder = tfds.builder("cifar10", data_dir=folder, file_format=request.param)
    builder._split_generators = lambda *_, **__: {split: examples() for split in ("train", "test")}
    builder.download_and_prepare()
    return str(folder), pixels


def test_a_prepared_tfds_dataset_is_read(tfds_folder):
    folder, pixels = tfds_folder
    source = open_source(get_preset("cifar10"), "train", DataSettings(data_dir=folder))
    assert source.num_examples == 10
    whole = batches(source, 10)
    assert rows(whole[:5]) == sorted(rows(pixels) * 2)
    test = open_source(get_preset("cifar10"), "test", DataSettings(data_dir=folder))
    in_order = ImageReader(test)(0, 10)
    assert rows(in_order) == rows(pixels)
    np.testing.assert_array_equal(ImageReader(test)(3, 4), in_order[3:7])
    np.testing.assert_array_equal(batches(source, 7, start_step=3), whole[3:])


def test_a_tfds_dataset_of_another_size_is_refused(tfds_folder):
    with pytest.raises(InputError, match=r"images are \(32, 32, 3\), the preset wants \(64, 64, 3\)"):
        open_source(get_preset("cifar10", image_size=64), "train", DataSettings(data_dir=tfds_folder[0]))


def test_a_data_dir_beside_the_right_one_is_told_the_right_one(tfds_folder):
    folder = tfds_folder[0]
    preset = get_preset("cifar10")
    for wrong in ("/cifar10", "/cifar10/", "/cifar10/3.0.2", "/.."):
        with pytest.raises(InputError) as raised:
            open_source(preset, "train", DataSettings(data_dir=folder + wrong))
        assert str(raised.value).startswith(f"data_dir={folder}{wrong} holds no prepared cifar10, but ")
        assert os.path.samefile(str(raised.value).split("but ")[1].removesuffix(" does: name that"), folder)


def test_a_damaged_tfds_dataset_is_named(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder[0], tmp_path, dirs_exist_ok=True)
    [file] = (tmp_path / "cifar10/3.0.2").glob("*train*")
    content = bytearray(file.read_bytes())
    content[5000] ^= 0xFF
    file.write_bytes(content)
    source = open_source(get_preset("cifar10"), "train", DataSettings(data_dir=str(tmp_path)))
    with pytest.raises(InputError, match=r"cifar10/3.0.2, train cannot be read: .*record 1 \("):
        ImageReader(source)(0, 10)
    file.write_bytes(b"x" * 70000)
    with pytest.raises(InputError, match=r"cifar10/3.0.2"):
        ImageReader(open_source(get_preset("cifar10"), "train", DataSettings(data_dir=str(tmp_path))))(0, 10)


def test_errors_name_the_setting_of_missing_data(tmp_path):
    with pytest.raises(InputError, match="data_dir=.*nowhere holds no prepared cifar10: make it with `tfds build"):
        open_source(get_preset("cifar10"), "train", DataSettings(data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="tfrecord=.*nothing.* matches no file"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(tmp_path / "nothing*")))
    with pytest.raises(InputError, match="dataset=lsun_church is read from StyleGAN TFRecords"):
        open_source(SMALL_IMAGES)


def test_errors_name_the_file_of_wrong_tfrecords(tmp_path, images):
    good = tmp_path / "good.tfrecords"
    write_tfrecord(good, images)
    wrong_size = dataclasses.replace(SMALL_IMAGES, image_size=32)
    with pytest.raises(InputError, match=r"good.tfrecords`: images are \(16, 16, 3\), the preset wants \(32, 32, 3\)"):
        open_source(wrong_size, "train", DataSettings(tfrecord=str(good)))

    cut = tmp_path / "cut.tfrecords"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut.tfrecords is truncated: record 9 has 723 of the 823 bytes"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(cut)))
    cut.write_bytes(good.read_bytes()[:100])
    with pytest.raises(InputError, match="cut.tfrecords is not a StyleGAN TFRecord"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(cut)))
    cut.write_bytes(b"")
    with pytest.raises(InputError, match="cut.tfrecords holds no records"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(cut)))

    picture = tmp_path / "picture.png"
    picture.write_bytes(tf.io.encode_png(images[0]).numpy())
    with pytest.raises(InputError, match="picture.png is not a StyleGAN TFRecord"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(picture)))
    with pytest.raises(InputError, match="is a folder: name the .tfrecords files"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(tmp_path)))


def test_bad_records_are_named_and_replaced(tmp_path, images):
    sound, bad = tmp_path / "sound.tfrecords", tmp_path / "bad.tfrecords"
    write_tfrecord(sound, images)
    content = bytearray(sound.read_bytes())
    record = len(content) // 10
    for index in (3, 4):
        content[index * record + 100] ^= 1
    content[7 * record] ^= 1  # the length of the record
    bad.write_bytes(content[: 9 * record + 5])  # and the last one is cut off

    with pytest.raises(InputError, match="skip_bad_records=3: there are more bad records: .*bad.tfrecords: record 3"):
        open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(bad), skip_bad_records=3))
    source = open_source(
        SMALL_IMAGES, "train", DataSettings(tfrecord=str(tmp_path / "*.tfrecords"), skip_bad_records=4)
    )
    assert source.bad_records == 4 and source.num_examples == 20
    replaced = images[[0, 1, 2, 2, 2, 5, 6, 6, 8, 8]]
    np.testing.assert_array_equal(ImageReader(source)(0, 20), np.concatenate([replaced, images]))
    whole = batches(source, 10)
    assert rows(whole[:5]) == rows(np.concatenate([replaced, images]))
    np.testing.assert_array_equal(batches(source, 7, start_step=3), whole[3:])

    bad.write_bytes(content[: 9 * record])
    source = open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(bad)))
    with pytest.raises(InputError, match=r"bad.tfrecords: record 3 \(its bytes .*: repair the file, or"):
        ImageReader(source)(0, 9)


def claim(content, index, num_bytes):
    """Equal records of which one claims, with a matching CRC, to be `num_bytes` long."""
    record = len(content) // 24
    length = num_bytes.to_bytes(8, "little")
    header = length + masked_crc32c(length).to_bytes(4, "little")
    return content[: index * record] + header + content[index * record + len(header) :]


def test_a_record_that_claims_more_than_its_file_is_not_allocated(tmp_path):
    preset = get_preset("lsun_church", image_size=4, ch_mult=(1,), attn_resolutions=(4,))
    path, content = tmp_path / "a.tfrecords", TINY_TFRECORD.read_bytes()
    for index, num_bytes in itertools.product((1, 23), (2**12, 2**35, 2**40, 2**62, 2**63 + 1, 2**64 - 1)):
        path.write_bytes(claim(content, index, num_bytes))
        with pytest.raises(InputError, match=rf"a.tfrecords: record {index} \(its bytes claim .*: repair the file, or"):
            open_source(preset, "train", DataSettings(tfrecord=str(path)))
    path.write_bytes(claim(claim(content, 7, 2**40), 23, 2**62))
    source = open_source(preset, "train", DataSettings(tfrecord=str(path), skip_bad_records=2))
    wanted = ImageReader(open_source(preset, "train", DataSettings(tfrecord=str(TINY_TFRECORD))))(0, 24)
    wanted[[7, 23]] = wanted[[6, 22]]
    np.testing.assert_array_equal(ImageReader(source)(0, 24), wanted)


def test_a_short_record_that_leads_to_a_long_one_is_found(tmp_path):
    path, content = tmp_path / "a.tfrecords", TINY_TFRECORD.read_bytes()
    record = len(content) // 24
    short = claim(content, 3, record // 2 - 16)
    place = 3 * record + record // 2  # where the next record begins then
    path.write_bytes(short[:place] + claim(content, 0, 2**40)[:12] + short[place + 12 :])
    with pytest.raises(InputError, match=r"record 4 \(its bytes claim to be more than the file has\): prepare it"):
        check_lengths([str(TINY_TFRECORD), str(path)], "prepare it")


def test_what_exists_is_no_glob(tmp_path, images):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    for name in ("b[2].tfrecords", "b2.tfrecords", "c?.tfrecords"):
        write_tfrecord(folder / name, images[:5])
    count = lambda pattern: open_source(SMALL_IMAGES, "train", DataSettings(tfrecord=str(pattern))).num_examples
    assert count(folder / "b[2].tfrecords") == count(folder / "c?.tfrecords") == 5
    assert count(folder / "*.tfrecords") == 15 and count(folder / "b*") == 10
    assert count(tmp_path / "a*" / "b2.tfrecords") == 5


@pytest.mark.parametrize(
    ("dataset", "settings", "paths"),
    [
        ("digits", {}, {}),
        ("cifar10", {}, {"data_dir": "~/tensorflow_datasets"}),
        ("cifar10", {"data_dir": "gs://b/tfds"}, {"data_dir": "gs://b/tfds"}),
        ("cifar10", {"tfrecord": "gs://b/*"}, {"tfrecord": "gs://b/*"}),
        ("lsun_cat", {"tfrecord": "/data/*"}, {"tfrecord": "/data/*"}),
        ("digits", {"npz": "a.npz"}, {"npz": "a.npz"}),
        ("digits", {"images": "gs://b/pictures"}, {"cache_dir": "~/.cache/diffusion_tf"}),
    ],
)
def test_the_paths_of_a_run_include_the_defaults(dataset, settings, paths):
    found = data_paths(get_preset(dataset), DataSettings(**settings))
    assert {name: path for name, path in found.items() if path} == paths


def test_the_shuffle_buffer_has_bounded_memory():
    assert shuffle_buffer_size(50_000, (32, 32, 3)) == 50_000
    assert shuffle_buffer_size(3_000_000, (256, 256, 3)) * 256 * 256 * 3 <= 2**30


def test_images_and_labels_stay_paired():
    """Each image holds its own label, in batches of several epochs, after a resume, for two workers."""
    labels = np.random.RandomState(0).randint(0, 7, 50)
    pixels = np.broadcast_to(labels[:, None, None, None], (50, 4, 4, 1)).astype(np.uint8)
    source = array_source(pixels, labels=labels)
    assert source.classes == tuple("0123456") and source.num_examples == 50

    def pairs(count, start_step=0, **kwargs):
        dataset = training_batches(
            source, batch_size=16, per_replica=8, seed=3, start_step=start_step, with_labels=True, **kwargs
        )
        batches = list(dataset.take(count).as_numpy_iterator())
        for images, found in batches:
            np.testing.assert_array_equal(images, np.broadcast_to(found[:, None, None, None], (8, 4, 4, 1)))
        return np.concatenate([found for _, found in batches])

    whole = pairs(14)  # of seven steps
    np.testing.assert_array_equal(pairs(8, start_step=3), whole[3 * 16 :])
    workers = [pairs(7, worker=w, workers=2).reshape(7, 8) for w in range(2)]
    np.testing.assert_array_equal(np.concatenate(workers, axis=1).ravel(), whole)
    read = label_reader(source)
    np.testing.assert_array_equal(np.concatenate([read(0, 20), read(20, 30)]), labels)


def test_digits_have_their_labels_and_others_are_refused():
    source = open_source(DIGITS, "test")
    np.testing.assert_array_equal(label_reader(source)(0, 179), load_digit_labels("test"))
    assert conditional_preset(DIGITS, source).num_classes == 10
    with pytest.raises(ConfigError, match="num_classes=3: scikit-learn digits, test has 10 classes"):
        conditional_preset(dataclasses.replace(DIGITS, num_classes=3), source)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    with pytest.raises(ConfigError, match="conditional: images of an array has no labels"):
        conditional_preset(DIGITS, array_source(images))
    for labels, message in (
        (np.zeros(2, int), r"labels must be int or str \[3\], one for each image, not int64 \[2\]"),
        (np.zeros(3), r"not float64 \[3\]"),
        (np.array([0, -1, 2]), "the label -1 is negative"),
    ):
        with pytest.raises(InputError, match=message):
            array_source(images, labels=labels)
