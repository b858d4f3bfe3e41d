"""The page about a run shows the results in its folder, and names the commands for those that are missing."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.reports.run_page import paper_table, to_markdown, to_png
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.storage.files import write_json
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


def test_page_of_an_untouched_run_names_the_commands(tmp_path):
    record = read_run(make_run(tmp_path, "digits"))
    markdown = to_markdown(record, "report.png")
    for program in ("likelihood", "rate_distortion", "evaluate"):
        assert f"Not measured: `python -m experiments.{program}`" in markdown
    assert "Not trained yet" in markdown and "| num_steps | " in markdown and "Beside the paper" not in markdown
    assert Image.open(io.BytesIO(to_png(record))).size[0] > 1000
    with pytest.raises(InputError, match="holds no run"):
        read_run(Workdir(tmp_path / "nothing"))


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
    assert "| 1000 | 2.25000 | 0.50000 |" in markdown and "20 of 800,000 steps: loss 0.03" in markdown
    assert "| 30 | ancestral, 1000 | 5,000 | 9 of cifar10, train | frechet_pixels | 0.5 |" in markdown
    np.asarray(Image.open(io.BytesIO(to_png(record))))


def test_page_compares_samplers_and_keeps_them_out_of_the_papers_table(tmp_path):
    workdir = make_run(tmp_path, "cifar10")
    workdir.append_evaluation(evaluation(10, fid=6.0))
    few = {"sampler": "ddim", "ddim_eta": 0.0, "sampler_spacing": "trailing"}
    scores = [(1000, {}, 4.5), (50, few, 4.0), (10, few, 8.0), (20, {**few, "ddim_eta": 1.0}, 7.0)]
    for steps, sampler, fid in scores:
        line = {"sampler": "ancestral", "sampler_steps": steps, **sampler, "fid": fid}
        workdir.append_evaluation(evaluation(20, **line, precision=0.75, recall=0.5))
    record = read_run(workdir)
    markdown = to_markdown(record, "report.png")
    table = "| ancestral | 1000 | 4.5 | 0.75 | 0.5 |\n| ddim | 10 | 8 | 0.75 | 0.5 |\n"
    assert table + "| ddim, eta 1 | 20 | 7 | 0.75 | 0.5 |\n| ddim | 50 | 4 | 0.75 | 0.5 |" in markdown
    assert "| **this run** |  | 4.50 |" in markdown and "| 20 | ddim, 10 | 5,000 |" in markdown
    np.asarray(Image.open(io.BytesIO(to_png(record))))


def test_page_of_an_lsun_run_has_table_3(tmp_path):
    workdir = make_run(tmp_path, "lsun_church")
    empty = paper_table(read_run(workdir))
    assert "| StyleGAN2 | 3.86 | paper, Table 3 |" in empty and "| **this run** |  | not measured |" in empty
    workdir.append_evaluation(evaluation(10, fid=8.0))
    source = "evaluations.jsonl, step 10, 5,000 samples against 9 of cifar10, train"
    assert f"| **this run** | 8.00 | {source} |" in paper_table(read_run(workdir))
