"""The page about a run shows the results in its folder, and names the commands for those that are missing."""

import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.reports.run_page import paper_table, to_markdown
from diffusion_tf.reports.run_picture import plot_rate_distortion, to_png
from diffusion_tf.reports.run_record import RunRecord, read_run
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.storage.workdir import Workdir


def make_run(tmp_path, dataset):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset(dataset), 100, "")
    return workdir


def evaluation(step, **scores):
    return {
        "step": step,
        "num_samples": 5000,
        "reference": {"num_images": 9, "images": "cifar10, train", "split": "train"},
        **scores,
    }


def likelihood(split, bits_per_dim):
    subject = {"images": f"cifar10, {split}", "num_images": 7, "step": 20, "bits_per_dim_standard_error": None}
    terms = {"prior_bits_per_dim": 1e-5, "middle_bits_per_dim": 2.0, "decoder_bits_per_dim": 1.5}
    return {**subject, **terms, "bits_per_dim": bits_per_dim, "terms_bits_per_dim": [1.5, 1.0, 1.0]}


def picture_size(record):
    return Image.open(io.BytesIO(to_png(record))).size


def test_page_of_an_untouched_run_names_the_commands(tmp_path):
    record = read_run(make_run(tmp_path, "digits"))
    markdown = to_markdown(record, "report.png")
    for program in ("likelihood", "rate_distortion", "evaluate", "compress encode"):
        assert f": `python -m experiments.{program}`" in markdown
    assert markdown.startswith("# digits, not trained here\n\n![") and "unchanged" in markdown
    assert "Beside the paper" not in markdown and "## Training" not in markdown
    width, height = picture_size(record)
    assert width > 1000 and height < 400  # no empty panels
    with pytest.raises(InputError, match="holds no run"):
        read_run(Workdir(tmp_path / "nothing"))


def test_page_lists_the_fields_that_differ_from_the_preset(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits", num_steps=7, ch_mult=(1,)), 100, "")
    table = to_markdown(read_run(workdir), "report.png").partition("## Configuration")[2]
    assert "| ch_mult | (1,) |\n| num_steps | 7 |\n\n<sub>dataset=digits" in table
    assert table.count("num_steps") == 1 and "batch_size=64" in table
    workdir = Workdir(tmp_path / "other")
    workdir.write_config(dataclasses.replace(get_preset("digits"), dataset="flowers"), 100, "")
    assert "| batch_size | 64 |" in to_markdown(read_run(workdir), "report.png")  # no preset to differ from


def test_page_shows_the_papers_numbers_beside_the_runs(tmp_path):
    workdir = make_run(tmp_path, "cifar10")
    workdir.append_metrics({"step": 20, "loss": 0.03, "grad_norm": 0.5})
    workdir.append_evaluation(evaluation(10, fid=4.5, inception_score=9.0))
    workdir.append_evaluation(evaluation(20, fid=3.25, inception_score=9.5, kid=float("nan")))
    workdir.append_evaluation(evaluation(30, frechet_pixels=0.5))
    for split, bits in (("test", 3.756), ("train", 3.721)):
        write_json(f"{workdir.path}/likelihood_{split}.json", likelihood(split, bits))
    table = [{"reverse_process_time": 1000, "rate_bits_per_dim": 2.25, "distortion_rmse": 0.5}]
    subject = {"images": "cifar10, test", "num_images": 7, "step": 20}
    write_json(f"{workdir.path}/rate_distortion_test.json", {**subject, "table": table})
    record = read_run(workdir)
    markdown = to_markdown(record, "report.png")
    source = "evaluations.jsonl, step 20, 5,000 samples against 9 of cifar10, train"
    source += "; likelihood_train.json; likelihood_test.json"
    assert f"| **this run** | 9.50 | 3.25 | <= 3.76 (3.72) | {source} |" in markdown
    assert "| DDPM, L_simple | 9.46 ± 0.11 | 3.17 | <= 3.75 (3.72) | paper, Table 1 |" in markdown
    assert "|  | this run | paper |" in markdown and "| bits/dim, test | 3.76 | <= 3.75 |" in markdown
    assert "| fid | 3.25 | 3.17 |\n| inception_score | 9.5 | 9.46 ± 0.11 |" in markdown
    assert "| 1000 | 2.25000 | 0.50000 |" in markdown and "# cifar10, 20 of 800,000 steps\n" in markdown
    assert "| 30 | ancestral | 1000 | 5,000 | 9 of cifar10, train |  |  | 0.5 |" in markdown
    assert picture_size(record)[1] > 1000


def test_page_says_what_a_code_of_few_levels_takes(tmp_path):
    workdir = make_run(tmp_path, "digits")
    write_json(f"{workdir.path}/likelihood_test.json", {**likelihood("test", 4.67), "levels": 17})
    write_json(f"{workdir.path}/likelihood_train.json", {**likelihood("train", 4.6), "levels": 256})
    markdown = to_markdown(read_run(workdir), "report.png")
    assert "bits/dim, test, a uniform code of the images' 17 levels takes 4.09 | 4.67" in markdown
    assert markdown.count("uniform code") == 1
    write_json(f"{workdir.path}/likelihood_test.json", {**likelihood("test", 4.67), "levels": 0})
    with pytest.raises(InputError, match="likelihood_test.json"):
        read_run(workdir)


def test_page_shows_every_evaluation_by_its_sampler(tmp_path):
    workdir = make_run(tmp_path, "digits")
    ddim = {"sampler": "ddim", "sampler_steps": 5, "ddim_eta": 0.0, "sampler_spacing": "trailing"}
    ddim["use_clipped_model_output"] = False
    dpm = {"sampler": "dpm_solver++", "sampler_steps": 5, "sampler_spacing": "linspace"}
    workdir.append_evaluation(evaluation(20, **ddim, frechet_digits=8.0, notes={"frechet_digits": "few samples"}))
    height = picture_size(read_run(workdir))[1]
    workdir.append_evaluation({**evaluation(20, **dpm, frechet_digits=4.0), "num_samples": 300})
    record = read_run(workdir)
    markdown = to_markdown(record, "report.png")
    assert "| 20 | ddim | 5 | 5,000 | 9 of cifar10, train | 8 |" in markdown
    assert "| 20 | dpm_solver++, linspace | 5 | 300 | 9 of cifar10, train | 4 |" in markdown
    assert markdown.count("\n- frechet_digits: few samples\n") == 1
    assert "scores of samples: `" not in markdown  # nothing says that they were not measured
    assert "| frechet_digits, dpm_solver++, linspace in 5 steps | 4 |" in markdown
    assert height > 500 and picture_size(record)[1] == height  # one panel


def test_page_keeps_other_samplers_out_of_the_papers_table(tmp_path):
    workdir = make_run(tmp_path, "cifar10")
    workdir.append_evaluation(evaluation(10, fid=6.0))
    few = {"sampler": "ddim", "ddim_eta": 0.0, "sampler_spacing": "trailing", "use_clipped_model_output": False}
    scores = [(1000, {}, 4.5), (50, few, 4.0), (10, few, 8.0), (20, {**few, "ddim_eta": 1.0}, 7.0)]
    for steps, sampler, fid in scores:
        line = {"sampler": "ancestral", "sampler_steps": steps, **sampler, "fid": fid}
        workdir.append_evaluation(evaluation(20, **line, precision=0.75, recall=0.5))
    record = read_run(workdir)
    markdown = to_markdown(record, "report.png")
    row = "| 20 | {} | {} | 5,000 | 9 of cifar10, train | {} | 0.75 | 0.5 |"
    rows = [("ancestral", 1000, 4.5), ("ddim", 10, 8), ("ddim, eta 1", 20, 7), ("ddim", 50, 4)]
    assert "\n".join(row.format(*values) for values in rows) in markdown
    assert "| **this run** |  | 4.50 |" in markdown and "| fid | 4.5 | 3.17 |" in markdown
    assert picture_size(record)[1] > 500


def test_page_says_whether_samples_copy(tmp_path):
    workdir = make_run(tmp_path, "digits")
    distances = {"distances": [3.0, 2.0, 2.5], "held_out_distances": [1.0, 2.0, 4.0]}
    result = {
        "verdict": "no copies", "sentence": "The samples do not copy.", "p_value": 0.5, "probability_nearer": 0.4,
        "near_share": 0.0, "near_p_value": 1.0, "median_distance": 2.5, "held_out_median_distance": 2.0, "copies": 0,
        "mirrored_copies": 1, "images": "digits", "num_images": 1618, "num_samples": 3, "num_held_out": 3,
        "features": "pixels", "notes": {"held_out": "one is there too"},
    }  # fmt: skip
    assert "copies of training pictures: `" in to_markdown(read_run(workdir), "report.png")
    height = picture_size(read_run(workdir))[1]
    write_json(f"{workdir.path}/neighbors.json", {**result, **distances})
    record = read_run(workdir)
    markdown = to_markdown(record, "report.png")
    assert "## Copying or learning\n\nThe samples do not copy. 0 samples equal a training picture, 1 a" in markdown
    assert "| held-out pictures | 3 | 2 |\n\n- held_out: one is there too" in markdown
    assert "copies of training pictures: `" not in markdown and picture_size(record)[1] > height
    write_json(f"{workdir.path}/neighbors.json", {**result, **distances, "distances": []})
    with pytest.raises(DamagedFileError, match="neighbors.json"):
        read_run(workdir)


def rate_distortion_record(table, curve):
    subject = {"images": "digits, test", "num_images": 7, "step": 20}
    return RunRecord(
        config=dataclasses.asdict(get_preset("digits")),
        metrics=[],
        likelihood={},
        rate_distortion={"test": {**subject, "table": table, **curve}},
        compression={},
        evaluations=[],
        neighbors={},
        samples=None,
        reconstructions=None,
    )


def test_rate_distortion_is_drawn_at_every_t_and_never_by_chords():
    t = np.arange(1000)
    rate, rmse = 3.0 * 0.99**t, 100.0 * (1.0 - 0.99**t) ** 4  # convex: chords lie above it
    curve = [{"rate_bits_per_dim": r, "distortion_rmse": d} for r, d in zip(rate.tolist(), rmse.tolist(), strict=True)]
    axes = Figure().subplots()
    plot_rate_distortion(axes, rate_distortion_record(curve[::100], {"curve": curve}))
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack([rate, rmse], axis=1))
    axes = Figure().subplots()
    plot_rate_distortion(axes, rate_distortion_record(curve[::100], {}))  # a file of an older version has ten points
    assert len(axes.lines) == 1 and axes.lines[0].get_linestyle() == "None"


def test_page_of_an_lsun_run_has_table_3(tmp_path):
    workdir = make_run(tmp_path, "lsun_church")
    empty = paper_table(read_run(workdir))
    assert "| StyleGAN2 | 3.86 | paper, Table 3 |" in empty and "| **this run** |  | not measured |" in empty
    workdir.append_evaluation(evaluation(10, fid=8.0))
    source = "evaluations.jsonl, step 10, 5,000 samples against 9 of cifar10, train"
    assert f"| **this run** | 8.00 | {source} |" in paper_table(read_run(workdir))


def write_results(workdir):
    """One result of each kind, as the programs write them."""
    workdir.append_metrics({"step": 20, "loss": 0.03, "grad_norm": 0.5, "images_per_sec": 9.0})
    workdir.append_evaluation(evaluation(10, frechet_digits=4.5, sampler="ddim", sampler_steps=50))
    subject = {"images": "digits, test", "num_images": 7, "step": 20}
    rate = [{"reverse_process_time": 4, "rate_bits_per_dim": 2.25, "distortion_rmse": 0.5}]
    files = [{"reverse_process_time": 4, "steps_bits_per_dim": 2.25, "distortion_rmse": 0.5}]
    write_json(f"{workdir.path}/likelihood_test.json", likelihood("test", 3.5))
    write_json(f"{workdir.path}/rate_distortion_test.json", {**subject, "table": rate})
    write_json(f"{workdir.path}/compression_test.json", {**subject, "table": files})


RESULTS = ("metrics.jsonl", "evaluations.jsonl", "likelihood_test.json", "rate_distortion_test.json")
RESULTS += ("compression_test.json",)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_without_a_field_or_of_another_type_is_read_or_refused_by_name(tmp_path, name):
    workdir = make_run(tmp_path, "digits")
    write_results(workdir)
    path = tmp_path / name
    sound = json.loads(path.read_text())
    refusals = []
    for changed in mutations(sound):
        path.write_text(json.dumps(changed) + "\n")
        try:
            to_markdown(read_run(workdir), "report.png")
        except DamagedFileError as error:
            refusals.append(str(error))
    assert len(refusals) > 20 and all(name in line and "\n" not in line for line in refusals)


def test_every_value_of_a_result_that_is_read_can_be_drawn(tmp_path):
    workdir = make_run(tmp_path, "digits")
    write_results(workdir)
    workdir.append_metrics({"step": 2**62, "loss": float("nan"), "grad_norm": 1e38})
    workdir.append_metrics({"step": 40})
    workdir.append_evaluation(evaluation(2**62, frechet_digits=1e38))
    to_png(read_run(workdir))


def mutations(value):
    """The JSON value with each of its parts removed, or replaced by values of other types."""
    yield from (None, [], {}, 1, "x", True, [value], float("nan"), 1e300)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, dict):
            yield {name: kept for name, kept in value.items() if name != key}
        for changed in mutations(item):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield copy


def test_a_damaged_picture_is_refused_by_name(tmp_path):
    workdir = make_run(tmp_path, "digits")
    picture = tmp_path / "samples/step_00000020.png"
    picture.parent.mkdir()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64), np.uint8)).save(picture)
    sound = picture.read_bytes()
    assert read_run(workdir).samples == str(picture)
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    for content in (b"", b"text", sound[:40], sound[:2000], bomb.getvalue()):
        picture.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"step_00000020.png is not a picture, or is damaged .*: remove it"):
            read_run(workdir)
