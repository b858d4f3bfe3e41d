"""The notebook: its code runs in order, and it is committed as a notebook without outputs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CELLS = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())["cells"]


def test_the_notebook_has_the_fields_of_format_4_5_and_no_outputs():
    notebook = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "651,041 parameters" in done.stdout
    rmse = float(done.stdout.split("RMSE of the whole file: ")[1].split()[0])
    bits_per_dim = float(done.stdout.split(" +- ")[0].split()[-1])
    assert rmse < 20 and 1 < bits_per_dim < 8
    assert (tmp_path / "runs/quickstart/metrics.jsonl").exists()
