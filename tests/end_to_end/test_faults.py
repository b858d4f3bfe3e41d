"""A table of faults: each ends a program with one line and an exit code, and leaves all files as they were."""

import hashlib
import io
import os
import pathlib
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from support.forked_programs import ROOT, run_fork
from support.full_disks import make_read_only, mounted

from diffusion_tf.data.digits import load_digits
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.solvers import SAMPLERS
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import TrainState

pytestmark = pytest.mark.slow  # minutes: each fault starts a program

PRESET = get_preset("digits", ch_mult=(1,), num_timesteps=4, batch_size=8, num_steps=8)
RECORDS = (ROOT / "tests/fixtures/stylegan2_4x4.tfrecords").read_bytes()
RECORD = len(RECORDS) // 24
DIGIT = Image.fromarray(load_digits()[0, :, :, 0])


# --- How files are broken -----------------------------------------------------------------------------------


def text(name, content):
    return lambda run: (run / name).write_text(content)


def data(name, content):
    return lambda run: (run / name).write_bytes(content)


def change(name, edit):
    """`edit` of a file's bytes, given and returned as a bytearray."""

    def break_it(run):
        (run / name).write_bytes(edit(bytearray((run / name).read_bytes())))

    return break_it


def flip(place):
    def edit(content):
        content[place] ^= 1
        return content

    return edit


def overflow(run):
    arrays = dict(checkpoints.load(str(run / NEWEST)))
    arrays["ema/conv_in/kernel"] = arrays["ema/conv_in/kernel"] * np.float32(1e25)
    checkpoints.save(str(run / "checkpoints"), 4, arrays)


def several(*breaks):
    return lambda run: [break_it(run) for break_it in breaks]


def npz(name, **arrays):
    return lambda run: np.savez(run / name, **arrays)


def saved(name, picture, file_format="PNG"):
    return lambda run: picture.save(run / name, file_format)


def bomb(name):
    """An archive of 8 bytes that claims to hold an array of 2^40 bytes."""

    def break_it(run):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40,)})
        with zipfile.ZipFile(run / name, "w") as archive:
            archive.writestr("samples.npy", header.getvalue() + bytes(8))

    return break_it


def records_of(dtype=np.uint8, shape=(3, 4, 4), second=None):
    """StyleGAN TFRecords of two images; the second states the shape `second`, if given."""

    def break_it(run):
        with tf.io.TFRecordWriter(str(run / "x.tfrecords")) as writer:
            for stated in (shape, second or shape):
                feature = {
                    "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=stated)),
                    "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[np.zeros(shape, dtype).tobytes()])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())

    return break_it


def checkpoint_of(preset):
    def break_it(run):
        arrays = TrainState(preset, make_strategy("one_device")).to_arrays()
        checkpoints.save(str(run / "checkpoints"), 4, arrays)

    return break_it


def newer_format(run):
    format_then, checkpoints.FORMAT = checkpoints.FORMAT, 99
    try:
        checkpoints.save(str(run / "checkpoints"), 4, {"x": np.zeros(3, np.float32)})
    finally:
        checkpoints.FORMAT = format_then


class Pickled:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return pathlib.Path("was_run").touch, ()


def cats(run):
    """Turns the run into one of 4x4 images, with samples."""
    (run / "config.json").unlink()
    preset = get_preset("lsun_cat", image_size=4, ch=32, ch_mult=(1,), attn_resolutions=())
    Workdir(str(run)).write_config(preset, 24, "")
    np.savez(run / "x.npz", samples=np.zeros((9, 4, 4, 3), np.uint8))


NEWEST, OLDER = "checkpoints/step_00000004.safetensors", "checkpoints/step_00000002.safetensors"
TRAIN = ["--ch_mult=1", "--num_timesteps=4", "--batch_size=8", "--num_steps=8"]
CAT = [
    "--dataset=lsun_cat",
    "--image_size=4",
    "--ch=32",
    "--ch_mult=1",
    "--attn_resolutions=",
    "--tfrecord=run/x.tfrecords",
]
SAMPLE = ["--out=new.npz"]
SCORE = ["--features=pixels", "--metrics=fid", "--samples=run/x.npz", "--out=new.json"]
sound = lambda run: None

FLAGS = [
    ("an unknown preset", sound, ["--dataset=mnist"], "--dataset=mnist: choose one of digits"),
    ("an unknown flag", sound, ["--learning_rat=1"], "Unknown command line flag 'learning_rat'"),
    ("an unknown choice", sound, ["--loss_type=l1"], "flag --loss_type=l1: value should be one of <mse|kl>"),
    ("no number", sound, ["--batch_size=many"], "flag --batch_size=many"),
    ("no whole numbers", sound, ["--ch_mult=1,two"], "--ch_mult=1,two: must be integers separated by commas"),
    ("not positive", sound, ["--batch_size=0"], "--batch_size=0: must be greater than 0"),
    ("not a number", sound, ["--learning_rate=nan"], "--learning_rate=nan: must be greater than 0"),
    ("out of range", sound, ["--ema_decay=1"], "--ema_decay=1.0: must be in [0, 1)"),
    ("a negative seed", sound, ["--seed=-1"], "--seed=-1: must be in [0, 2^32)"),
    ("no skipping", sound, ["--max_skipped_steps=0"], "--max_skipped_steps=0: must be greater than 0"),
    ("negative skipping", sound, ["--skip_bad_records=-1"], "flag --skip_bad_records=-1"),
    ("skipping of digits", sound, ["--skip_bad_records=1"], "--skip_bad_records=1 goes with --tfrecord"),
    ("no multiple", sound, ["--checkpoint_every=7"], "--checkpoint_every=7: must be a multiple of"),
    ("nothing to fit in", sound, ["--fit=gpu24"], "--fit=gpu24: give cpu, minutes:30, the memory of a GPU as gpu24g"),
    (
        "too little memory",
        sound,
        ["--workdir=new", "--batch_size=100000", "--fit=gpu1g"],
        "--fit=gpu1g: 100000 images of 8x8x1 with --ch=32 do not fit",
    ),
    ("a shift over the edge", sound, ["--random_shift=8"], "--random_shift=8: must be less than the sides"),
    ("an argument", sound, ["resume"], "unknown argument resume: flags start with --"),
    ("another recipe", sound, ["--dropout=0.5"], "another recipe (dropout: 0.5 != 0.0"),
    ("a workdir that is a file", sound, ["--workdir=run/flags.txt"], "--workdir=run/flags.txt is not a folder"),
    ("a read-only workdir", sound, ["--workdir=/proc/sys"], "cannot write /proc/sys/lock"),
    (
        "no source",
        sound,
        ["--workdir=new", "--init_from=nothing"],
        "--init_from=nothing is neither a run nor a diffusers",
    ),
    (
        "another source",
        sound,
        ["--init_from=run"],
        "--init_from=run: the run in run started with random weights: choose",
    ),
    (
        "another network",
        sound,
        ["--workdir=new", "--init_from=run", "--ch=64"],
        "run holds the weights of another network (ch: 64 != 32, asked != there): leave out --dataset",
    ),
    ("no TPU", sound, ["--strategy=tpu"], "--tpu=local: "),
]
DATA = [
    ("no file", sound, "--tfrecord=run/x.tfrecords matches no file"),
    ("a folder", lambda run: (run / "x.tfrecords").mkdir(), "x.tfrecords is a folder"),
    ("an empty file", data("x.tfrecords", b""), "x.tfrecords holds no records"),
    ("a picture", data("x.tfrecords", b"\x89PNG" + bytes(99)), "x.tfrecords is not a StyleGAN TFRecord"),
    ("a cut tail", data("x.tfrecords", RECORDS[:-3]), f"record 23 has {RECORD - 3} of the {RECORD} bytes"),
    ("a bad CRC in front", data("x.tfrecords", flip(40)(bytearray(RECORDS))), "its first record is cut off"),
    ("another size", records_of(shape=(3, 8, 8)), "images are (8, 8, 3), the preset wants (4, 4, 3)"),
    ("another dtype", records_of(dtype=np.float32), "record 0 holds 192 bytes, not uint8 pixels"),
]
RECORD_FAULTS = [
    ("a bad CRC", data("x.tfrecords", flip(5 * RECORD + 40)(bytearray(RECORDS))), "x.tfrecords: record 5 (its bytes"),
    ("a bad length", data("x.tfrecords", flip(7 * RECORD)(bytearray(RECORDS))), "x.tfrecords: record 7 (its bytes"),
    ("another shape", records_of(second=(4, 4, 3)), "x.tfrecords: record 1 (it is not an image of the preset's shape"),
]
CATS_SCORE = ["--features=pixels", "--metrics=fid", "--samples=run/x.npz", CAT[-1], "--out=new.json"]
CHECKPOINTS = [
    ("cut off", change(NEWEST, lambda content: content[:-1]), f"{NEWEST} is not a checkpoint, or is damaged (it has"),
    ("a flipped bit", change(NEWEST, flip(-5)), f"{NEWEST} is damaged, its contents do not match their SHA-256"),
    ("a flipped manifest", change(NEWEST, flip(40)), f"{NEWEST} is"),
    ("an empty file", data(NEWEST, b""), f"{NEWEST} is not a checkpoint, or is damaged (its header does not fit)"),
    ("a huge header", data(NEWEST, b"\xff" * 8 + b"{}"), f"{NEWEST} is not a checkpoint, or is damaged (its header"),
    ("a deep header", data(NEWEST, (10**6).to_bytes(8, "little") + b"[" * 10**6), f"{NEWEST} is not a checkpoint"),
    ("a pickle", data(NEWEST, pickle.dumps(Pickled())), f"{NEWEST} is not a checkpoint, or is damaged"),
    ("a newer format", newer_format, f"{NEWEST} is of format 99, and this version reads up to 2: update it"),
    (
        "another network",
        checkpoint_of(get_preset("digits", ch_mult=(1, 1))),
        f"{NEWEST} holds another network: its arr",
    ),
]
RUN = [
    ("no configuration", lambda run: (run / "config.json").unlink(), "--workdir=run holds no run (no config.json)"),
    ("a cut configuration", change("config.json", lambda c: c[:-9]), "run/config.json is not JSON, or is damaged"),
    ("an unknown field", change("config.json", lambda c: c.replace(b'"ch"', b'"cx"')), "not a configuration of this"),
    (
        "too many timesteps",
        change("config.json", lambda c: c.replace(b'"num_timesteps": 4', b'"num_timesteps": 1e9')),
        "run/config.json is not a configuration of this version (num_timesteps=1000000000.0: must be a whole number)",
    ),
    ("a deep configuration", text("config.json", "[" * 10**5), "run/config.json is not JSON, or is damaged"),
    ("no checkpoint", lambda run: shutil.rmtree(run / "checkpoints"), "holds no checkpoint; there are: none"),
]
SAMPLES = [
    ("no samples", sound, "cannot read run/x.npz"),
    ("a text", text("x.npz", "no archive"), "x.npz is not an .npz file, or is damaged"),
    ("cut off", several(npz("x.npz", samples=load_digits()), change("x.npz", lambda c: c[:-9])), "x.npz is not an"),
    ("a pickle", npz("x.npz", samples=np.array([Pickled()], object)), "x.npz is not an .npz file, or is damaged"),
    ("a bomb", bomb("x.npz"), "x.npz is not an .npz file, or is damaged (samples.npy claims to be uint8"),
    ("another name", npz("x.npz", images=load_digits()), "x.npz holds no array named samples (there are: images uint8"),
    ("another dtype", npz("x.npz", samples=np.zeros((9, 8, 8, 1))), "x.npz holds float64 (9, 8, 8, 1), not samples"),
    ("another shape", npz("x.npz", samples=np.zeros((9, 4, 4, 1), np.uint8)), "x.npz holds uint8 (9, 4, 4, 1), not"),
]
ENCODE = ["encode", "--images=run/x.png", "--out=new"]
PICTURES = [
    ("no file", sound, "cannot read the picture run/x.png (it does not exist)"),
    ("an empty file", data("x.png", b""), "run/x.png (it is empty)"),
    ("a text", text("x.png", "<html>"), "run/x.png (it is none of "),
    ("a link to nothing", lambda run: (run / "x.png").symlink_to("nowhere"), "run/x.png (it is a link to nothing)"),
    ("another size", saved("x.png", Image.new("L", (9, 8))), "run/x.png (its size is 9 x 8 pixels, and must be 8 x 8"),
    ("a bomb", saved("x.png", Image.new("1", (20000, 8000))), "run/x.png (its size is 20000 x 8000 pixels, and"),
    ("Lab colours", saved("x.png", Image.new("LAB", (8, 8)), "TIFF"), "run/x.png (its mode is LAB, of which black"),
    ("cut off", several(saved("x.png", DIGIT), change("x.png", lambda c: c[:-20])), "run/x.png (it is damaged: "),
]


def folder(*names, sizes=((8, 8),) * 9, **files):
    """A folder run/in of grey pictures, and of text files by their name without its dot."""

    def break_it(run):
        (run / "in").mkdir()
        for name, size in zip(names, sizes, strict=False):
            Image.new("L", size).save(run / "in" / name)
        for name, content in files.items():
            (run / "in" / name.replace("_", ".")).write_text(content)

    return break_it


OWN = ["--workdir=new", "--images=run/in", "--cache_dir=run/cache", "--image_size=8", "--channels=1"]
NPZ = ["--workdir=new", "--npz=run/x.npz"]
two = folder("a.png", "b.png")
one_label = '{"file_name": "a.png", "label": 0}'
OWN_IMAGES = [
    ("no folder", sound, OWN, "--images=run/in does not exist: name the folder"),
    ("no levels", two, [*OWN, "--image_size=127"], "--image_size=127: images of 127x127 pixels cannot be halved often"),
    ("an empty folder", folder(), OWN, "--images=run/in holds no images"),
    ("texts only", folder(a_txt="", b_txt=""), OWN, "--images=run/in holds no images: neither an LMDB (data.mdb) nor"),
    ("one picture", folder("a.png"), OWN, "--images=run/in: there is one image, and one is held out: add others, or"),
    ("mixed sizes", folder("a.png", "b.png", sizes=((8, 8), (8, 9))), [*OWN, "--resize=none", "--held_out=0"],
     "in: b.png cannot be read (its size is 8 x 9 pixels, and must be 8 x 8 (width x height)), and --skip_bad_records"),
    ("a bad picture", folder("a.png", b_png="", c_png=""), [*OWN, "--skip_bad_records=1", "--held_out=0"],
     "c.png cannot be read (it is empty), and --skip_bad_records is 1: --skip_bad_records=N leaves out up to N"),
    ("too few labels", folder("a.png", "b.png", metadata_jsonl=one_label), OWN,
     "--images=run/in: metadata.jsonl has labels for 1 pictures, but none for b.png"),
    ("labels of others", folder("b.png", "c.png", metadata_jsonl=one_label), OWN, "line 1, names a.png, which is not"),
    ("no place for the cache", two, [*OWN, "--cache_dir=run/flags.txt"], "run/flags.txt: cannot write "),
    ("a folder and a file", two, [*OWN, *NPZ], "--npz and --images both name images: give one"),
    ("resizing of nothing", sound, ["--resize=pad"], "--resize=pad goes with --images or --npz or --tfds"),
    ("no arrays", npz("x.npz", pictures=load_digits()), NPZ, "--npz=run/x.npz must hold images or samples, uint8"),
    ("too few npz labels", npz("x.npz", images=load_digits(), labels=np.arange(9)), NPZ,
     "--npz=run/x.npz: labels must be int or str [1797], one for each image, not int64 [9]"),
    ("no TFDS", sound, ["--workdir=new", "--tfds=shapes", "--data_dir=run"], "--data_dir=run holds no prepared shapes"),
]  # fmt: skip
EXTENSIONS = [
    ("sample", ["--out=new.npz", "--png=new.jpg"], "--png=new.jpg must end in .png"),
    ("sample", ["--out=new.npy"], "--out=new.npy must end in .npz, or name a folder"),
    ("figures", ["--figure=samples", "--out=new.jpg"], "--out=new.jpg must end in .png"),
    ("figures", ["--figure=animation", "--out=new.png"], "--out=new.png must end in .gif"),
]
FIGURE = ["--figure=interpolation", "--source_a=run/x.png", "--out=new.png"]
digits = npz("x.npz", samples=load_digits()[:32])
cache = "reference_pixels_train.npz"
WHITE, BLACK = (Image.new("L", (8, 8), level) for level in ("white", "black"))
pictures = several(saved("x.png", DIGIT), saved("white.png", WHITE), saved("black.png", BLACK))
INPAINT, VARY = ["--inpaint=run/x.png", "--out=new.npz"], ["--start_from=run/x.png", "--out=new.npz"]
CHANGES = [
    ("no mask", pictures, INPAINT, "--inpaint needs --mask, a picture that is white where to paint"),
    ("a mask alone", pictures, [*VARY, "--mask=run/white.png"], "--mask goes with --inpaint"),
    ("two changes", pictures, [*INPAINT, *VARY], "give one of --encode, --inpaint and --start_from"),
    (
        "a mask of another size",
        several(pictures, saved("m.png", Image.new("L", (8, 9)))),
        [*INPAINT, "--mask=run/m.png"],
        "run/m.png (its size is 8 x 9 pixels, and must be 8 x 8",
    ),
    ("a mask that paints nothing", pictures, [*INPAINT, "--mask=run/black.png"], "run/black.png is dark everywhere"),
    ("no picture", sound, [*INPAINT, "--mask=run/x.png"], "cannot read the picture run/x.png (it does not exist)"),
    (
        "a multistep sampler",
        pictures,
        [*INPAINT, "--mask=run/white.png", "--sampler=dpm_solver++", "--sampler_steps=4"],
        "--sampler=dpm_solver++ uses the step before",
    ),
    ("too strong", pictures, [*VARY, "--strength=1.5"], "--strength=1.5 must be in (0, 1]"),
    ("no strength", pictures, [*VARY, "--strength=0"], "--strength=0.0 must be in (0, 1]"),
    ("a strength alone", sound, [*SAMPLE, "--strength=0.5"], "--strength goes with --start_from"),
    ("to resume a file", sound, [*SAMPLE, "--resume"], "--resume goes with a folder --out"),
    ("a folder of others", sound, ["--out=run/checkpoints"], "--out=run/checkpoints holds other files"),
]
COPIES = [
    ("no held-out pictures", several(records_of(), cats), [CAT[-1], "--samples=run/x.npz"],
     "are the training pictures: name others, which training did not see, by --held_out_tfrecord"),
    ("few samples", npz("x.npz", samples=load_digits()[:9]), ["--samples=run/x.npz"],
     "run/x.npz: 9 pictures are too few for a verdict, take at least 20"),
]  # fmt: skip
STATISTICS = [
    ("a text", several(digits, text(cache, "features")), f"run/{cache} is not an .npz file, or is damaged"),
    ("a bomb", several(digits, bomb(cache)), f"run/{cache} is not an .npz file, or is damaged"),
    ("a pickle", several(digits, npz(cache, features=np.array([Pickled()], object))), f"run/{cache} is not an .npz"),
    (
        "of others",
        several(digits, npz(cache, description=np.array('{"split": "test"}'))),
        f"run/{cache} holds a reference",
    ),
    ("no JSON", several(digits, npz(cache, description=np.array("{"))), f"run/{cache} is not a reference"),
]
OVERFLOWING = [
    *[("sample", ["--out=y.npz", f"--sampler={name}", "--sampler_steps=4"]) for name in SAMPLERS],
    ("sample", ["--out=y.npz", "--sampler=ddim", "--sampler_steps=2", "--encode=run/x.npz"]),
    ("evaluate", ["--num_samples=10", "--batch_size=10"]),
    ("likelihood", ["--num_images=4"]),
    ("rate_distortion", ["--num_images=4"]),
    ("figures", ["--figure=progressive", "--out=y.png"]),
    ("figures", ["--figure=interpolation", "--out=y.png"]),
    ("compress", ["encode", "--split=test", "--num_images=1", "--out=y"]),
]
best = lambda run: (run / "checkpoints/best").mkdir()
two_bad = data("x.tfrecords", flip(5 * RECORD + 40)(bytearray(RECORDS[:-3])))
both_damaged = several(change(NEWEST, flip(-5)), change(OLDER, flip(-5)))
damaged_metrics = text("metrics.jsonl", '{"step": 2}\nstep 4\n')
TABLE = [
    *[("train", f"flags: {name}", fault, [*TRAIN, *args], line) for name, fault, args, line in FLAGS],
    *[("train", f"data: {name}", fault, ["--workdir=new", *CAT], line) for name, fault, line in DATA],
    *[("train", f"own images: {name}", fault, args, line) for name, fault, args, line in OWN_IMAGES],
    *[("evaluate", f"data: {name}", several(fault, cats), CATS_SCORE, line) for name, fault, line in RECORD_FAULTS],
    ("train", "data: more bad records than tolerated", two_bad, ["--workdir=new", *CAT, "--skip_bad_records=1"],
     "--skip_bad_records=1: there are more bad records: run/x.tfrecords: record 5"),
    *[("sample", f"checkpoints: {name}", fault, SAMPLE, line) for name, fault, line in CHECKPOINTS],
    ("train", "checkpoints: all damaged", both_damaged, TRAIN,
     "run/checkpoints holds only damaged checkpoints, of steps [2, 4]"),
    ("sample", "checkpoints: no such step", sound, [*SAMPLE, "--checkpoint=3"], "no checkpoint of step 3; there"),
    ("train", "metrics: damaged", damaged_metrics, TRAIN, "metrics.jsonl, line 2, is not JSON, or is damaged"),
    ("train", "labels: none", data("x.tfrecords", RECORDS), ["--workdir=new", *CAT, "--conditional"],
     "--conditional: run/x.tfrecords has no labels"),
    ("train", "labels: of other classes", sound, ["--workdir=new", "--num_classes=3"],
     "--num_classes=3: scikit-learn digits, train has 10 classes"),
    ("sample", "labels: of no class", sound, [*SAMPLE, "--label=3"], "--label=3: choose from no classes in this run"),
    ("sample", "labels: guidance without any", sound, [*SAMPLE, "--guidance=2"], "--guidance=2 needs a run with"),
    *[("sample", f"run: {name}", fault, SAMPLE, line) for name, fault, line in RUN],
    *[("evaluate", f"samples: {name}", fault, SCORE, line) for name, fault, line in SAMPLES],
    *[("compress", f"pictures: {name}", fault, ENCODE, line) for name, fault, line in PICTURES],
    ("figures", "pictures: another size", saved("x.png", Image.new("RGB", (8, 9))), FIGURE, "run/x.png (its size is"),
    *[(program, f"extensions: {line}", sound, args, line) for program, args, line in EXTENSIONS],
    ("evaluate", "best: no object", several(best, text("checkpoints/best/evaluation.json", "[1]")), SCORE[:2],
     "checkpoints/best/evaluation.json is damaged, or not of this program (Expected `object`, got `array`): remove it"),
    ("report", "results: no table", text("rate_distortion_test.json", '{"images": "x", "num_images": 1, "step": 4}'),
     [], "rate_distortion_test.json is damaged, or not of this program (Object missing required field `table`; there"),
    ("report", "results: a text", text("likelihood_test.json", "bits"), [], "likelihood_test.json is not JSON, or is"),
    *[("evaluate", f"statistics: {name}", fault, SCORE, line) for name, fault, line in STATISTICS],
    *[("sample", f"changes: {name}", fault, args, line) for name, fault, args, line in CHANGES],
    *[("neighbors", f"copies: {name}", fault, [*args, "--out=new.json"], line) for name, fault, args, line in COPIES],
    *[(program, f"overflow: {' '.join(args[:2])}", several(digits, overflow), args, "000004.safetensors overflows, use")
      for program, args in OVERFLOWING],
]  # fmt: skip


# --- The table ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """An intact run with two checkpoints."""
    workdir = Workdir(str(tmp_path_factory.mktemp("sound") / "run"))
    workdir.write_config(PRESET, 1618, "")
    arrays = TrainState(PRESET, make_strategy("one_device")).to_arrays()
    for step in (2, 4):
        checkpoints.save(workdir.checkpoints, step, {**arrays, "step": np.asarray(step, np.int64)})
        workdir.append_metrics({"step": step, "loss": 1.0})
    return pathlib.Path(workdir.path)


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "flags.txt")
    }


@pytest.mark.parametrize(
    ("program", "fault", "args", "line"),
    [pytest.param(program, *rest, id=name) for program, name, *rest in TABLE],
)
def test_a_fault_ends_the_program_with_its_line(tmp_path, sound_run, program, fault, args, line):
    run = tmp_path / "run"
    shutil.copytree(sound_run, run)
    fault(run)
    before = digests(tmp_path)
    ended = run_fork(program, "--workdir=run", *args, folder=tmp_path)
    # Without progress bars.
    *others, last = [text for text in ended.stderr.splitlines() if text.strip() and "%|" not in text]
    assert ended.returncode == 1 and last.startswith(f"{program}: ") and line in last, ended.stderr
    assert all(re.match(r"[WI]\d{4} |WARNING: All log messages before absl", text) for text in others), ended.stderr
    assert not ended.stdout
    after = digests(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert {path.parts[0] for path in after} == {"run"}  # no new file, and no code in a file was run


def test_a_full_disk_changes_nothing(tmp_path, sound_run):
    run = tmp_path / "run"
    shutil.copytree(sound_run, run)
    before = digests(run)
    ended = run_fork("train", "--workdir=run", *TRAIN, "--num_steps=9", folder=tmp_path, most_bytes=100)
    assert ended.returncode == 1 and ended.stderr.startswith("train: cannot write run/config.json (")
    assert digests(run) == before


def fill(disk, *, free):
    """Leaves `free` bytes of a disk."""
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - free))


ON_DISK = ["--workdir=disk/run", *TRAIN, "--checkpoint_every=100", "--steps_per_loop=4"]


@pytest.mark.parametrize(
    ("program", "args", "free", "file"),
    [
        ("train", ON_DISK, 0, "run/lock"),
        (
            "train",
            ON_DISK,
            3 * 2**12,
            "tensorboard",
        ),
        ("train", ON_DISK, 2**16, "checkpoints"),
        ("sample", ["--workdir=run", "--out=disk/x.npz", "--num_samples=200"], 2**12, "x.npz"),
        ("sample", ["--workdir=run", "--out=x.npz", "--png=disk/x.png", "--num_samples=64"], 2**12, "x.png"),
        ("export", ["--workdir=run", "--what=denoiser", "--out=disk/export"], 2**20, "export/saved_model "),
        ("export", ["--workdir=run", "--what=denoiser", "--out=disk/export"], 2**12, "export/denoiser.stablehlo.mlir"),
        ("import_checkpoint", ["--workdir=run", "--export_diffusers=disk/folder"], 2**16, "folder"),
        ("report", ["--workdir=run", "--out=disk/report.md"], 2**12, "report.png"),
    ],
)
def test_each_program_names_what_a_full_disk_did_not_take(tmp_path, sound_run, program, args, free, file):
    shutil.copytree(sound_run, tmp_path / "run")
    with mounted(tmp_path / "disk", 2**23) as disk:
        (disk / "run").mkdir()
        fill(disk, free=free)
        ended = run_fork(program, *args, folder=tmp_path)
        line = ended.stderr.splitlines()[-1]
        assert ended.returncode == 1 and f"{program}: cannot write disk/" in line, ended.stderr
        assert file in line and line.endswith("(the disk is full: make room on it)")
        assert not [path for path in disk.rglob("*") if "tmp" in path.name]


def test_a_read_only_run_is_measured_with_out(tmp_path, sound_run):
    def measure(program, *args):
        return run_fork(program, *args, "--workdir=disk/run", folder=tmp_path)

    score = ["--features=pixels", "--metrics=fid", "--num_samples=10", "--num_reference=20", "--batch_size=10"]
    with mounted(tmp_path / "disk", 2**25) as disk:
        shutil.copytree(sound_run, disk / "run")
        make_read_only(disk)
        refused = measure("evaluate", *score)
        assert refused.returncode == 1 and "(Read-only file system): --out puts the results elsewhere" in refused.stderr
        for program, *args in (
            ("evaluate", *score, "--out=out/scores.json"),
            ("evaluate", *score, "--out=out/again.json"),
            ("likelihood", "--num_images=4", "--out=out/likelihood.json"),
            ("compress encode", "--split=test", "--num_images=2", "--num_table_images=4", "--out=out/files"),
            ("compress decode", "--source=out/files", "--out=out/decoded"),
        ):
            name, *command = program.split()
            ended = measure(name, *command, *args)
            assert ended.returncode == 0, ended.stderr
    out = tmp_path / "out"
    assert (out / "scores.json").read_text() == (out / "again.json").read_text()
    assert len((out / "run.results/evaluations.jsonl").read_text().splitlines()) == 1
    assert len(list((out / "decoded").iterdir())) == 2
    kept = {path.name for path in (out / "run.results").iterdir()}
    assert {"evaluations.jsonl", "reference_pixels_train.npz", "compression", "partial"} <= kept


def test_the_table_has_at_least_forty_faults():
    assert len(TABLE) >= 40
