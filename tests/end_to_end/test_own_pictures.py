"""An odd folder of sixty files through one command, as somebody with a folder of pictures uses the programs."""

import json

import numpy as np
import pytest
from support.forked_programs import run_fork
from support.odd_pictures import PICTURES, write_odd_pictures

pytestmark = pytest.mark.slow  # minutes of training


def test_the_demo_goes_through_an_odd_folder(tmp_path):
    write_odd_pictures(tmp_path / "my pictures")
    where = ["--images=my pictures", "--cache_dir=cache", "--skip_bad_records=2"]
    size = ["--image_size=16", "--num_steps=60", "--num_samples=100"]
    refused = run_fork("demo", "--workdir=run", *where[:2], *size, folder=tmp_path)
    assert refused.returncode == 1 and "cannot be read" in refused.stderr.splitlines()[-1]

    ended = run_fork("demo", "--workdir=run", *where, *size, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 cannot be read (broken/cut.jpg, broken/text.png)" in ended.stderr and "precision" in ended.stdout
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["dataset"] == "images" and config["num_examples"] < PICTURES
    assert config["data"] == {"images": "my pictures", "cache_dir": "cache", "skip_bad_records": 2}
    samples = np.load(tmp_path / "run/samples/samples_00000060.npz")["samples"]
    assert samples.shape == (100, 16, 16, 3) and samples.dtype == np.uint8
    assert "precision" in (tmp_path / "run/report.md").read_text() and (tmp_path / "run/report.png").exists()

    # The same command again, and a measurement, read the cache; the measurement finds the held-out pictures by itself.
    again = run_fork("demo", "--workdir=run", *where, *size, folder=tmp_path)
    assert again.returncode == 0 and "; read from the cache " in again.stderr
    assert len((tmp_path / "run/evaluations.jsonl").read_text().splitlines()) == 1
    measured = run_fork("likelihood", "--workdir=run", "--num_timesteps_estimate=2", folder=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert f"my pictures, test: {PICTURES - config['num_examples']} images" in measured.stdout
