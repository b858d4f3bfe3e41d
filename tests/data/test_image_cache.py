"""Folders of pictures through the cache: contents, splits, classes, reuse, resuming and what is refused."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from support.odd_pictures import CORRUPT, LEFT_OUT, PICTURES, encoded, picture, write_odd_pictures

from diffusion_tf.data import open_images
from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_cache import cached_source
from diffusion_tf.data.image_folders import find_images
from diffusion_tf.data.picture_folder import find_split
from diffusion_tf.data.pictures import decode_picture
from diffusion_tf.data.source import ImageReader, training_batches
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import ConfigError, InputError

SHAPE = (16, 16, 3)


def open_folder(folder, tmp_path, split="train", shape=SHAPE, **settings):
    data = DataSettings(**{"images": str(folder), "cache_dir": str(tmp_path / "cache"), **settings})
    return open_images(data, split, lambda _: shape)


def write_pictures(folder, names, size=(20, 20)):
    """A picture of its own for each name."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(index, size)))


def all_images(source):
    return ImageReader(source)(0, source.num_examples)


def names_by_label(source):
    """The label of each image in order, as the name of its class."""
    return [source.classes[int(source.label(record))] for record in source.records(None)]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "my pictures"
    write_odd_pictures(folder)
    return folder


def test_an_odd_folder_becomes_images(odd, tmp_path, capfd):
    train, test = (open_folder(odd, tmp_path, split, skip_bad_records=2) for split in ("train", "test"))
    lines = capfd.readouterr().err
    assert train.num_examples + test.num_examples == PICTURES and 1 <= test.num_examples <= 10
    assert "; 2 cannot be read (broken/cut.jpg, broken/text.png)" in lines
    assert all(f"{count} {kind}" in lines for kind, count in LEFT_OUT.items())
    assert "5 were smaller than 16x16 and are enlarged" in lines  # those of 20x12
    split = {name: find_split(str(odd), name, 0.05).keys for name in ("train", "test")}
    sound = [name for name in split["train"] if name not in CORRUPT]
    wanted = []
    for name in sound:
        image = PIL.Image.fromarray(decode_picture((odd / name).read_bytes(), 3))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        wanted.append(np.asarray(image.crop((left, top, left + side, top + side)).resize((16, 16), 1)))
    np.testing.assert_array_equal(all_images(train), np.stack(wanted))
    assert not set(split["train"]) & set(split["test"])


def test_the_second_start_reads_no_picture(tmp_path, capfd):
    write_pictures(tmp_path / "in", [f"{index}.png" for index in range(9)])
    first = all_images(open_folder(tmp_path / "in", tmp_path))
    for path in (tmp_path / "in").iterdir():
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    capfd.readouterr()
    again = open_folder(tmp_path / "in", tmp_path)
    assert "read from the cache" in capfd.readouterr().err
    np.testing.assert_array_equal(all_images(again), first)
    np.testing.assert_array_equal(
        *(
            np.stack(list(training_batches(source, batch_size=4, per_replica=4, seed=0, start_step=0).take(5)))
            for source in (again, open_folder(tmp_path / "in", tmp_path))
        )
    )


def test_a_cache_can_be_read_only(tmp_path):
    write_pictures(tmp_path / "in", ["a.png", "b.png"])
    open_folder(tmp_path / "in", tmp_path)
    [cache] = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.iterdir())}
    open_folder(tmp_path / "in", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.iterdir())} == before


@pytest.mark.parametrize("change", ["content", "name", "size", "resize", "channels", "label"])
def test_a_change_makes_another_cache(tmp_path, change):
    folder = tmp_path / "in"
    write_pictures(folder, ["a/1.png", "b/2.png", "b/3.png"])
    open_folder(folder, tmp_path)
    settings, shape = {}, SHAPE
    if change == "content":
        (folder / "a/1.png").write_bytes(encoded(picture(9)))
    elif change == "name":
        (folder / "a/1.png").rename(folder / "a/0.png")
    elif change == "label":
        lines = [json.dumps({"file_name": name, "label": 3}) for name in ("a/1.png", "b/2.png", "b/3.png")]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    else:
        settings = {"resize": "stretch"} if change == "resize" else {}
        shape = {"size": (8, 16, 3), "channels": (16, 16, 1)}.get(change, SHAPE)
    assert open_folder(folder, tmp_path, shape=shape, **settings).image_shape == shape
    assert len(list((tmp_path / "cache").iterdir())) == 2


class _DiesInTheMiddle(ThreadPoolExecutor):
    """Runs one task at a time, and raises in place of the third."""

    def __init__(self, _):
        super().__init__(1)
        self._left = 2

    def submit(self, function, *args):
        self._left -= 1
        return super().submit(function if self._left >= 0 else _die, *args)


def _die(*_):
    raise KeyboardInterrupt


def test_an_interrupted_preparation_continues(tmp_path):
    write_pictures(tmp_path / "in", [f"{index:03d}.png" for index in range(200)], size=(4, 4))
    images = find_images(str(tmp_path / "in"), setting="images")
    options = {"cache_dir": str(tmp_path / "cache"), "skip_bad_images": 0}
    with pytest.raises(KeyboardInterrupt):
        cached_source(images, "mine", Fitting((4, 4, 3)), **options, make_executor=_DiesInTheMiddle)
    [cache] = (tmp_path / "cache").iterdir()
    done = {path: path.stat().st_mtime_ns for path in cache.glob("*.tfrecords")}
    assert 1 <= len(done) < 4 and not list(cache.glob("*.tmp"))
    source = cached_source(images, "mine", Fitting((4, 4, 3)), **options)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    np.testing.assert_array_equal(all_images(source)[-1], np.asarray(picture(199, (4, 4))))
    assert source.num_examples == 200


def test_a_damaged_or_partial_cache_is_written_again(tmp_path):
    write_pictures(tmp_path / "in", ["a.png", "b.png", "c.png"])
    wanted = all_images(open_folder(tmp_path / "in", tmp_path))
    [cache] = (tmp_path / "cache").iterdir()
    shard = cache / "images-00000-of-00001.tfrecords"
    for damage in (
        lambda: shard.unlink(),
        lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        lambda: (cache / "images.json").write_text("{}"),
        lambda: (cache / "images.json").unlink(),
    ):
        damage()
        np.testing.assert_array_equal(all_images(open_folder(tmp_path / "in", tmp_path)), wanted)
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"in, train cannot be read: .*record \d .*: remove the folder {cache}, and"):
        all_images(open_folder(tmp_path / "in", tmp_path))


def test_held_out_pictures_are_stable(tmp_path):
    names = [f"{index:03d}.png" for index in range(300)]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).touch()
    test = set(find_split(str(tmp_path / "in"), "test", 0.05).keys)
    assert 5 <= len(test) <= 30 and test | set(find_split(str(tmp_path / "in"), "train", 0.05).keys) == set(names)
    for name in names[:100]:
        (tmp_path / "in" / name).unlink()
    assert set(find_split(str(tmp_path / "in"), "test", 0.05).keys) == test - set(names[:100])
    for name in names[100:298]:
        (tmp_path / "in" / name).unlink()
    assert [len(find_split(str(tmp_path / "in"), split, 1e-9).keys) for split in ("train", "test")] == [1, 1]


@pytest.mark.parametrize("test_name", ["test", "validation", "Val"])
def test_a_folder_with_splits_keeps_them(tmp_path, test_name):
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png", f"{test_name}/dog/3.png"])
    train, test = (find_split(str(tmp_path), split, 0.05) for split in ("train", "test"))
    assert (train.keys, test.keys) == (["train/cat/1.png", "train/dog/2.png"], [f"{test_name}/dog/3.png"])
    assert train.classes == test.classes == ("cat", "dog")
    assert (train.labels, test.labels) == ([0, 1], [1])


def test_train_alone_is_split_and_beside_other_classes_it_is_a_class(tmp_path):
    write_pictures(tmp_path, ["train/cat/1.png", "train/dog/2.png"])
    assert find_split(str(tmp_path), "train", 0.5).classes == ("cat", "dog")
    write_pictures(tmp_path, ["plane/3.png"])
    assert find_split(str(tmp_path), "train", 0.0).classes == ("plane", "train")


def test_labels_are_the_folders_and_travel_with_their_images(tmp_path):
    names = [f"{kind}/{index}.png" for kind in ("b", "a", "ü 日本") for index in range(5)]
    write_pictures(tmp_path / "in", names)
    source = open_folder(tmp_path / "in", tmp_path, held_out=0.0)
    assert source.classes == ("a", "b", "ü 日本")
    assert names_by_label(source) == ["a"] * 5 + ["b"] * 5 + ["ü 日本"] * 5
    label_of = {image.tobytes(): label for image, label in zip(all_images(source), names_by_label(source), strict=True)}
    records = list(source.records(7))
    assert [source.decode(record).numpy().tobytes() for record in records] != list(label_of)
    for record in records:
        image, label = source.decode(record).numpy().tobytes(), int(source.label(record))
        assert label_of[image] == source.classes[label]


def test_labels_of_any_size_make_records_of_one_length(tmp_path):
    names = [f"{kind:03d}/x.png" for kind in range(200)]
    write_pictures(tmp_path / "in", names, size=(2, 2))
    source = open_folder(tmp_path / "in", tmp_path, held_out=0.0, shape=(2, 2, 3))
    assert [int(source.label(record)) for record in source.records(None)] == list(range(200))
    assert len({len(record.numpy()) for record in source.records(None)}) == 1


def test_metadata_overrides_the_folders(tmp_path):
    write_pictures(tmp_path, ["x/1.png", "x/2.png", "y/3.png"])
    (tmp_path / "note.jsonl").touch()
    lines = [{"file_name": "x/1.png", "label": 10, "more": [1]}, {"file_name": "y/3.png", "label": 9}]
    write = lambda *lines: (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    write(*lines, {"file_name": "./x/2.png", "label": 10})
    images = find_split(str(tmp_path), "train", 0.0)
    assert (images.classes, images.labels, images.left_out) == (("9", "10"), [1, 1, 0], {".jsonl": 1})
    write({"file_name": "x/1.png", "text": "a caption"})
    assert find_split(str(tmp_path), "train", 0.0).classes == ("x", "y")
    for written, message in (
        (lines, "metadata.jsonl has labels for 2 pictures, but none for x/2.png"),
        ([*lines, {"file_name": "x/2.png", "label": "ten"}], "some labels are texts and others are numbers"),
        ([{"file_name": "z.png", "label": 1}], r"metadata.jsonl, line 1, names z.png, which is not a picture there"),
        ([{"label": 1}], r"metadata.jsonl, line 1, is damaged, or not of this program \(.*file_name"),
        ([{"file_name": "x/1.png", "label": True}], "metadata.jsonl, line 1, is damaged"),
    ):
        write(*written)
        with pytest.raises(ConfigError, match=rf"images={tmp_path}: .*{message}"):
            find_split(str(tmp_path), "train", 0.0)


def test_metadata_of_a_split_lies_in_it(tmp_path):
    write_pictures(tmp_path, ["train/1.png", "train/2.png", "test/3.png"])
    for split, names in (("train", ("1.png", "2.png")), ("test", ("3.png",))):
        lines = [json.dumps({"file_name": name, "label": f"kind of {name}"}) for name in names]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    images = find_split(str(tmp_path), "test", 0.05)
    assert images.classes == ("kind of 1.png", "kind of 2.png", "kind of 3.png") and images.labels == [2]


def test_pictures_outside_folders_have_no_labels(tmp_path):
    write_pictures(tmp_path, ["a/1.png", "2.png"])
    assert find_split(str(tmp_path), "train", 0.0).classes == ()


def test_bad_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.png").touch()
    (tmp_path / "none/b.png").touch()
    write_pictures(tmp_path / "one", ["a.png"])
    write_pictures(tmp_path / "mixed", ["a.png", "b.png"])
    write_pictures(tmp_path / "mixed", ["c.png"], size=(20, 30))
    (tmp_path / "file").touch()
    for name, settings, message in (
        ("empty", {}, "images=.*empty holds no images"),
        ("nowhere", {}, "images=.*nowhere does not exist"),
        ("none", {}, r"images=.*none: [ab].png cannot be read \(it is empty\), and `skip_bad_records` is 0: "),
        ("none", {"skip_bad_records": 2}, "images=.*none: none of its 1 images can be read"),
        ("one", {}, "images=.*one: there is one image, and one is held out: add others, or train on it alone by `held"),
        ("mixed", {"resize": "none", "held_out": 0.0},
         r"images=.*mixed: c.png cannot be read \(its size is 20 x 30 pixels, and must be 20 x 20"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as raised:
            open_folder(tmp_path / name, tmp_path, shape=(20, 20, 3), **settings)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="held_out=0 leaves .*one without a test split"):
        open_folder(tmp_path / "one", tmp_path, "test", held_out=0.0)
    assert open_folder(tmp_path / "one", tmp_path, held_out=0.0).num_examples == 1
    for cache_dir, message in (
        (tmp_path / "file/cache", "cache_dir=.*file/cache: cannot write .*: name a folder that can be written"),
        ("gs://bucket/cache", "cache_dir=gs://bucket/cache must be a local folder"),
        ("/proc/nothing", "cache_dir=/proc/nothing: cannot write "),
    ):
        with pytest.raises(ConfigError, match=message):
            open_images(
                DataSettings(images=str(tmp_path / "mixed"), cache_dir=str(cache_dir)), "train", lambda _: SHAPE
            )


def test_fewer_bad_pictures_are_tolerated_than_the_cache_left_out(odd, tmp_path):
    open_folder(odd, tmp_path, skip_bad_records=2, held_out=0.0)
    with pytest.raises(ConfigError, match=r"text.png cannot be read \(.*\), and `skip_bad_records` is 1"):
        open_folder(odd, tmp_path, skip_bad_records=1, held_out=0.0)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", ["a.png", "b.png"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_images(DataSettings(images=str(tmp_path / "in")), "train", lambda _: SHAPE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_images(DataSettings(images=str(tmp_path / "in")), "train", lambda _: SHAPE)
    digests = [os.listdir(tmp_path / place) for place in ("xdg/diffusion_tf", "home/.cache/diffusion_tf")]
    assert digests[0] == digests[1] and len(digests[0]) == 1


def test_settings_that_do_not_fit_together_are_refused():
    for settings, message in (
        ({"images": "a", "npz": "b"}, "npz and `images` both name images"),
        ({"resize": "pad"}, "resize=pad goes with `images` or `npz` or `tfds`"),
        ({"images": "a", "resize": "fill"}, "resize=fill: choose one of crop, pad, stretch, none"),
        ({"images": "a", "held_out": 1.0}, r"held_out=1.0 must be in \[0, 1\)"),
        ({"tfds": "a", "held_out": 0.1}, "held_out=0.1 goes with `images` or `npz`"),
        ({"tfrecord": "a", "cache_dir": "b"}, "cache_dir=b goes with"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataSettings(**settings)


def test_measurements_take_over_what_still_applies():
    run = DataSettings(images="a", resize="pad", cache_dir="c", skip_bad_records=2)
    assert run.replaced({}) == run
    assert run.replaced({"cache_dir": "d"}) == dataclasses.replace(run, cache_dir="d")
    assert run.replaced({"images": "b"}) == DataSettings(images="b", resize="pad", cache_dir="c")
    assert run.replaced({"tfrecord": "b"}) == DataSettings(tfrecord="b")
    assert DataSettings(tfrecord="a", data_dir="d").replaced({"images": "b"}) == DataSettings(images="b", data_dir="d")
