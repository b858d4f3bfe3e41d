"""Preparing StyleGAN TFRecords from folders and LMDBs: contents, resuming, refused settings and damaged files."""

import hashlib
import io
import json
import mmap
import os
import pathlib
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from support.full_disks import mounted

from diffusion_tf.data import open_source
from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import counts, find_images
from diffusion_tf.data.prepare_tfrecords import prepare
from diffusion_tf.data.source import ImageReader
from diffusion_tf.data.tfrecord_shards import Shard, write_shard
from diffusion_tf.data.tfrecords import serialize
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import get_preset

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZES = [(40, 30), (30, 41), (33, 33), (64, 17), (16, 16), (9, 12), (50, 50)]
FEATURES = {"shape": tf.io.FixedLenFeature([3], tf.int64), "data": tf.io.FixedLenFeature([], tf.string)}


def picture(index, size, mode="RGB"):
    coarse = np.random.RandomState(index).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    return PIL.Image.fromarray(coarse).resize(size).convert(mode)


def encode(image, extension, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, extension, **kwargs)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Seven JPEGs, the last in a folder of its own that sorts first."""
    path = tmp_path / "images"
    (path / "a").mkdir(parents=True)
    for index, size in enumerate(SIZES):
        name = f"b{index}.jpg" if index < 6 else "a/c.JPG"
        (path / name).write_bytes(encode(picture(index, size), "jpeg"))
    (path / "notes.txt").write_text("no image")
    return path


def write(source, out, **kwargs):
    """Prepares TFRecords in a thread, as worker processes take seconds to start."""
    options = {"name": "church", "resolution": 16, "num_shards": 3, "num_workers": 1, "skip_bad_images": 0, **kwargs}
    options["make_executor"] = ThreadPoolExecutor
    return prepare(find_images(str(source), options.pop("limit", None)), str(out), **options)


def records(pattern):
    return list(tf.data.TFRecordDataset(sorted(tf.io.gfile.glob(pattern))).as_numpy_iterator())


def read(pattern):
    """Images uint8 [N, H, W, C] by TensorFlow's own parser."""
    parsed = [tf.io.parse_single_example(record, FEATURES) for record in records(pattern)]
    return np.stack(
        [np.frombuffer(p["data"].numpy(), np.uint8).reshape(p["shape"].numpy()).transpose(1, 2, 0) for p in parsed]
    )


def by_hand(encoded, resolution):
    """The lines of StyleGAN's create_lsun, with PIL in OpenCV's place."""
    img = np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))
    crop = np.min(img.shape[:2])
    img = img[(img.shape[0] - crop) // 2 : (img.shape[0] + crop) // 2]
    img = img[:, (img.shape[1] - crop) // 2 : (img.shape[1] + crop) // 2]
    return np.asarray(PIL.Image.fromarray(img).resize((resolution, resolution), PIL.Image.LANCZOS))


def test_a_folder_becomes_records(folder, tmp_path):
    pattern, manifest = write(folder, tmp_path / "out")
    names = [folder / "a/c.JPG", *(folder / f"b{index}.jpg" for index in range(6))]
    wanted = np.stack([by_hand(name.read_bytes(), 16) for name in names])
    np.testing.assert_array_equal(read(pattern), wanted)
    preset = get_preset("lsun_church", image_size=16, ch_mult=(1, 2), attn_resolutions=(8,))
    source = open_source(preset, "train", DataSettings(tfrecord=pattern))
    np.testing.assert_array_equal(ImageReader(source)(0, 7), wanted)
    assert len({len(record) for record in records(pattern)}) == 1 and source.num_examples == 7

    files = [f"church-r04-0000{shard}-of-00003.tfrecords" for shard in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*files, "church.json"]
    written = json.loads((tmp_path / "out/church.json").read_text())
    assert written == manifest and list(written["shards"]) == files
    assert [entry["records"] for entry in written["shards"].values()] == [2, 2, 3]
    for file, entry in written["shards"].items():
        content = (tmp_path / "out" / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])


def test_an_lmdb_becomes_records_in_its_order(tmp_path):
    values = [
        encode(picture(0, (40, 30)), "webp"),
        encode(picture(1, (30, 41)), "jpeg"),
        encode(picture(2, (33, 20), "L"), "png"),
        encode(picture(3, (33, 20), "RGBA"), "png"),
        encode(picture(4, (33, 20), "P"), "png"),
    ]
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database, database.begin(write=True) as transaction:
        for index in (3, 1, 4, 0, 2):
            transaction.put(b"%040x" % index, values[index])
    pattern, manifest = write(tmp_path / "lmdb", tmp_path / "out", resolution=8, num_shards=None)
    np.testing.assert_array_equal(read(pattern), np.stack([by_hand(value, 8) for value in values]))
    assert manifest["num_images"] == manifest["num_shards"] == 5
    pattern, _ = write(tmp_path / "lmdb", tmp_path / "out", name="first", limit=2, num_shards=1)
    np.testing.assert_array_equal(read(pattern), np.stack([by_hand(value, 16) for value in values[:2]]))


def test_photos_are_turned_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    (tmp_path / "photo.png").write_bytes(encode(picture(0, (20, 20)), "png", exif=exif))
    pattern, _ = write(tmp_path, tmp_path / "out", num_shards=1)
    upright = encode(picture(0, (20, 20)).rotate(-90), "png")
    np.testing.assert_array_equal(read(pattern)[0], by_hand(upright, 16))


def test_every_picture_of_a_folder_is_listed_or_counted(folder, tmp_path):
    for name in ("d.gif", "d.tif", "d.tiff", "d.jfif", "d.jpe", "d.pgm", "d.PPM", "d.webp", ".hidden.png", "raw.heic"):
        (folder / name).touch()
    (folder / ".thumbnails").mkdir()
    (folder / "README").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/far.png").touch()
    (folder / "a/far").symlink_to(tmp_path / "elsewhere")
    (folder / "0a").symlink_to("a")  # a second way to pictures that are listed
    (folder / "a/up").symlink_to("..")  # a loop
    (folder / "self.png").symlink_to("self.png")
    (folder / "nothing.png").symlink_to("nowhere.png")
    found = find_images(str(folder))
    names = ["d.PPM", "d.gif", "d.jfif", "d.jpe", "d.pgm", "d.tif", "d.tiff", "d.webp", "nothing.png", "self.png"]
    assert found.keys == ["a/c.JPG", "a/far/far.png", *(f"b{index}.jpg" for index in range(6)), *names]
    assert found.left_out == {
        "hidden": 2, ".txt": 1, ".heic": 1, "without an extension": 1, "folder linked twice": 2,
    }  # fmt: skip
    assert counts({".txt": 1, "hidden": 2000}) == "1 .txt, 2,000 hidden"


def test_unusual_pictures_become_records(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    wide = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    (folder / "a.png").write_bytes(encode(PIL.Image.fromarray(wide), "png"))
    (folder / "caf\udce9.png").write_bytes(encode(picture(0, (16, 16)), "png"))  # a name in Latin-1
    (folder / "d.png").symlink_to("nowhere")
    (folder / "e.png").touch()
    os.mkfifo(folder / "f.png")
    pattern, manifest = write(folder, tmp_path / "out", num_shards=1, skip_bad_images=3)
    np.testing.assert_array_equal(read(pattern)[0], np.round(wide / 257)[..., None].repeat(3, -1))
    np.testing.assert_array_equal(read(pattern)[1], np.asarray(picture(0, (16, 16))))
    (entry,) = manifest["shards"].values()
    assert entry["skipped"] == {"d.png": "it is a link to nothing", "e.png": "it is empty", "f.png": "it is not a file"}
    assert write(folder, tmp_path / "out", num_shards=1, skip_bad_images=3)[1] == manifest
    with pytest.raises(
        InputError, match=r"d.png cannot be read \(it is a link to nothing\), and `skip_bad_images` is 0"
    ):
        write(folder, tmp_path / "again", num_shards=1)


def test_records_equal_those_of_stylegan2s_tool():
    same = 0
    for record in records(str(ROOT / "tests/fixtures/stylegan2_4x4.tfrecords")):
        parsed = tf.io.parse_single_example(record, FEATURES)
        ours = serialize(np.frombuffer(parsed["data"].numpy(), np.uint8).reshape(3, 4, 4))
        # StyleGAN2's tool writes the two features in random order.
        assert sorted(ours) == sorted(record) and tf.train.Example.FromString(ours) == tf.train.Example.FromString(
            record
        )
        same += ours == record
    assert same > 0


def run(*args):
    return [sys.executable, "-m", "experiments.prepare_lsun", *map(str, args)]


@pytest.mark.slow
def test_a_killed_run_continues(folder, tmp_path):
    for index in range(113):
        (folder / f"d{index:03d}.png").write_bytes(encode(picture(index, (200, 180)), "png"))
    out = tmp_path / "out"
    args = [f"--source={folder}", f"--out={out}", "--resolution=128", "--num_shards=40", "--num_workers=1"]
    program = subprocess.Popen(run(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while program.poll() is None and len(list(out.glob("*.tfrecords"))) < 2:
        time.sleep(0.01)
    program.kill()
    program.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.tfrecords")}
    noted = json.loads((out / "church.json").read_text())["shards"]
    assert 2 <= len(done) < 40 and len(done) - 1 <= len(noted) <= len(done)

    options = {"resolution": 128, "num_shards": 40}
    pattern, manifest = write(folder, out, **options)
    assert all((out / name).stat().st_mtime_ns == done[out / name] for name in noted)
    _, whole = write(folder, tmp_path / "whole", **options)
    assert manifest == whole and len(records(pattern)) == 120 and not list(out.glob("*.tmp"))

    after = {path: path.stat().st_mtime_ns for path in out.glob("*.tfrecords")}
    again = subprocess.run(run(*args), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tfrecords")} == after
    total = sum(path.stat().st_size for path in after)
    assert f"{pattern}: 120 images (0 skipped), {total:,} bytes, 40 files" in again.stdout
    assert f"--workdir=runs/church --dataset=lsun_church --image_size=128 --tfrecord='{pattern}'" in again.stdout
    assert "left out, since they are not pictures: 1 .txt\n" in again.stdout


@pytest.mark.slow
def test_the_programs_last_line_trains(folder, tmp_path):
    (folder / "e.png").touch()
    args = [f"--source={folder}", f"--out={tmp_path}/out", "--resolution=16", "--num_workers=1"]
    refused = subprocess.run(run(*args), cwd=ROOT, capture_output=True, text=True, check=False)
    last = refused.stderr.splitlines()[-1]
    assert refused.returncode == 1 and f"--source={folder}: e.png cannot be read (it is empty), and --skip_bad" in last
    ended = subprocess.run(run(*args, "--skip_bad_images=1"), cwd=ROOT, capture_output=True, text=True, check=True)
    summary, left_out, command = ended.stdout.splitlines()
    assert ": 7 images (1 skipped), " in summary and left_out == "left out, since they are not pictures: 1 .txt"
    program, *flags = shlex.split(command.removeprefix("train: "))
    trained = subprocess.run(
        [sys.executable if program == "python" else program, *flags, "--dry_run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "parameters: 17,587,715" in trained.stdout


def test_errors_of_workers_arrive_whole():
    error = pickle.loads(pickle.dumps(ConfigError("source", "=a: b.jpg cannot be read")))
    assert (type(error), error.field, str(error)) == (ConfigError, "source", "source=a: b.jpg cannot be read")


def test_lost_and_truncated_shards_are_written_again(folder, tmp_path):
    _, manifest = write(folder, tmp_path / "out")
    lost, cut, kept = ((tmp_path / "out" / name) for name in manifest["shards"])
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    before = kept.stat().st_mtime_ns
    _, again = write(folder, tmp_path / "out")
    assert again == manifest and kept.stat().st_mtime_ns == before
    for path in (lost, cut):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["shards"][path.name]["sha256"]


def test_other_settings_are_refused(folder, tmp_path):
    write(folder, tmp_path / "out")
    for change, message in (
        ({"resolution": 32}, r"church.json was begun with other settings \(resolution: 32 != 16, asked != there\)"),
        ({"num_shards": 2}, r"\(num_shards: 2 != 3, asked"),
        ({"limit": 5}, r"\(num_images: 5 != 7; names_sha256: "),
    ):
        with pytest.raises(InputError, match=message):
            write(folder, tmp_path / "out", **change)
    (folder / "b0.jpg").rename(folder / "b00.jpg")
    with pytest.raises(InputError, match=r"\(names_sha256: \w+ != \w+, asked"):
        write(folder, tmp_path / "out")
    folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"\(source: .*/moved != .*/images; names_sha256"):
        write(tmp_path / "moved", tmp_path / "out")
    (tmp_path / "out/church.json").unlink()
    with pytest.raises(InputError, match=r"church-r04-00000-of-00003.tfrecords exists but is not in .*church.json"):
        write(tmp_path / "moved", tmp_path / "out")


def test_a_manifest_of_another_structure_is_refused(folder, tmp_path):
    _, manifest = write(folder, tmp_path / "out")
    name, entry = next(iter(manifest["shards"].items()))
    not_ours = "church.json is not a manifest of this program: choose another `out` or `name`"
    for damaged, message in (
        ([], not_ours),
        (None, not_ours),
        ({}, not_ours),
        ({**manifest, "shards": []}, not_ours),
        ({**manifest, "shards": {name: 5}}, not_ours),
        ({**manifest, "shards": {name: {}}}, not_ours),
        ({**manifest, "shards": {name: {**entry, "bytes": "9"}}}, not_ours),
        ({**manifest, "shards": {name: {**entry, "skipped": [1]}}}, not_ours),
        ({**manifest, "shards": {name: {**entry, "skipped": {"a.jpg": 1}}}}, not_ours),
        ({**manifest, "resolution": 16.0}, not_ours),
        ({**manifest, "source": json.loads("[" * 500 + "]" * 500)}, not_ours),
        ({**manifest, "more": json.loads("[" * 500 + "]" * 500)}, not_ours),
        ({**manifest, "shards": {"x": entry}}, "church.json lists x, which is not of this run"),
    ):
        (tmp_path / "out/church.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=message):
            write(folder, tmp_path / "out")
    (tmp_path / "out/church.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match=not_ours):
        write(folder, tmp_path / "out")


def test_unreadable_images_are_skipped_only_on_request(folder, tmp_path, capsys):
    good = (folder / "b1.jpg").read_bytes()
    (folder / "b1.jpg").write_bytes(good[:-99])
    (folder / "b5.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"b1.jpg cannot be read \(.*truncated.*\), and `skip_bad_images` is 0"):
        write(folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"b5.jpg cannot be read \(it is none of .*\), and `skip_bad_images` is 1"):
        write(folder, tmp_path / "out", skip_bad_images=1)
    pattern, manifest = write(folder, tmp_path / "out", skip_bad_images=2)
    assert "skipped b5.jpg: it is none of AVIF, BMP" in capsys.readouterr().err
    assert len(read(pattern)) == 5 and [entry["records"] for entry in manifest["shards"].values()] == [2, 1, 2]
    assert [list(entry["skipped"]) for entry in manifest["shards"].values()] == [[], ["b1.jpg"], ["b5.jpg"]]
    for _ in range(2):  # shards without a readable image have no file
        pattern, manifest = write(folder, tmp_path / "single", skip_bad_images=2, num_shards=7)
        assert len(read(pattern)) == len(tf.io.gfile.glob(pattern)) == 5
        assert [entry["records"] for entry in manifest["shards"].values()] == [1, 1, 0, 1, 1, 1, 0]
    for key in find_images(str(folder)).keys:
        (folder / key).write_bytes(b"")
    with pytest.raises(InputError, match=r"source=.*images: none of its 7 images can be read"):
        write(folder, tmp_path / "none", skip_bad_images=7)


def test_a_full_disk_is_reported_and_the_command_continues_on_a_larger_one(folder, tmp_path):
    with mounted(tmp_path / "disk", 2**16) as disk:
        with pytest.raises(InputError, match=r"church-r06.*tfrecords \(the disk is full.*: repeat the command"):
            write(folder, disk / "out", resolution=64, num_shards=1)  # several would race with the manifest
        assert not list((disk / "out").glob("*.tmp"))
        shutil.copytree(disk / "out", tmp_path / "out")
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "out/church-r06-00000-of-00001.tfrecords.tmp").symlink_to(tmp_path / "victim")
    pattern, _ = write(folder, tmp_path / "out", resolution=64, num_shards=1)
    assert len(records(pattern)) == 7 and (tmp_path / "victim").read_text() == "kept"
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_failing_disk_is_reported(folder, tmp_path):
    (tmp_path / "out/church-r04-00001-of-00003.tfrecords.tmp").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot write .*church-r04-00001-of-00003.tfrecords \(.*repeat the command"):
        write(folder, tmp_path / "out")
    shard = Shard(
        str(tmp_path / "flipped.tfrecords"), find_images(str(folder)), Fitting((16, 16, 3)), skip_bad_images=0
    )
    with pytest.raises(InputError, match="does not read back as it was written: is its disk sound"):
        write_shard(shard, serialize=lambda image, _: serialize(image ^ 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 100}, "resolution=100 must be a power of two, 4 or more"),
        ({"resolution": 2}, "resolution=2 must be"),
        ({"num_shards": 8}, "num_shards=8 is more than the 7 images"),
        ({"name": "a/b"}, "name=a/b: letters, digits"),
        ({"out": "/tmp/a*"}, r"out=/tmp/a\*: without \* \?"),
        ({"out": "/tmp/caf\udce9"}, "must be UTF-8"),
        ({"out": "/proc/nothing"}, "cannot write /proc/nothing/church.json"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(folder, **{"out": tmp_path / "out", **options})


def test_a_damaged_lmdb_is_refused(tmp_path):
    path = tmp_path / "lmdb/data.mdb"
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**22) as database:
        for index in range(40):
            with database.begin(write=True) as transaction:
                transaction.put(b"%040x" % index, encode(picture(index, (60, 60)), "png"))
    whole = path.read_bytes()
    page = mmap.PAGESIZE
    assert len(find_images(str(tmp_path / "lmdb")).keys) == 40
    (tmp_path / "caf\udce9").symlink_to("lmdb")
    assert len(find_images(str(tmp_path / "caf\udce9")).keys) == 40
    for size in (0, 1, page, page + 100, page + 900, 2 * page, 3 * page, len(whole) // 2, len(whole) - page):
        path.write_bytes(whole[:size])  # reading it would end the process by SIGBUS
        with pytest.raises(InputError, match="lmdb (is truncated: data.mdb has|cannot be read as an LMDB)"):
            find_images(str(tmp_path / "lmdb"))
    # In both meta pages: signature, version, and the root of the tree of images (LMDB's MDB_meta).
    for place, length, message in (
        (16, 4, "not an LMDB"),
        (20, 4, "is not supported|VERSION"),
        (128, 8, "PAGE_NOTFOUND|is damaged"),
    ):
        damaged = bytearray(whole)
        for meta in (0, page):
            damaged[meta + place : meta + place + length] = b"\x7f" * length
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"lmdb .*({message})"):
            find_images(str(tmp_path / "lmdb"))


def test_bad_sources_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "lmdb").mkdir()
    for source, message in (
        (tmp_path / "nowhere", "source=.*nowhere does not exist: name the folder of an LMDB"),
        (folder / "notes.txt", "notes.txt is a file .unpack it first.: name the folder"),
        (tmp_path / "lmdb", "lmdb holds no images: neither an LMDB .data.mdb. nor .apng, .*, .jpeg, "),
    ):
        with pytest.raises(InputError, match=message):
            find_images(str(source))
    with lmdb.open(str(tmp_path / "lmdb")):
        pass
    with pytest.raises(InputError, match="lmdb holds no images"):
        find_images(str(tmp_path / "lmdb"))
    (tmp_path / "lmdb/data.mdb").write_bytes(os.urandom(9999))
    with pytest.raises(InputError, match="lmdb cannot be read as an LMDB"):
        find_images(str(tmp_path / "lmdb"))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match="is an LMDB, and lmdb is not installed: pip install lmdb"):
        find_images(str(tmp_path / "lmdb"))
    images = find_images(str(folder))
    (folder / "b3.jpg").unlink()
    with pytest.raises(InputError, match=r"b3.jpg cannot be read \(it does not exist\)"):
        prepare(
            images, str(tmp_path), name="a", resolution=4, num_shards=1, num_workers=1, skip_bad_images=0,
            make_executor=ThreadPoolExecutor,
        )  # fmt: skip
