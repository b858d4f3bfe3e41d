"""The wheel: what it holds, and that its command runs where there is no checkout."""

import configparser
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGED = ("diffusion_tf", "experiments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, since a build writes beside setup.py; setuptools is here, so no network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    command += [f"--wheel-dir={folder}", str(folder / "source")]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_modules_and_weights_and_no_top_level_experiments(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for name in PACKAGED for path in (ROOT / name).rglob("*.py")}
    installed = {name.replace("experiments/", "diffusion_tf/experiments/", 1) for name in modules}
    weights = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "diffusion_tf/pretrained").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == installed | weights | {"diffusion_tf/py.typed"}


def test_the_wheel_names_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"diffusion-tf": "diffusion_tf.experiments.__main__:main"}


def test_the_installed_command_runs_in_an_empty_folder(wheel, tmp_path):
    """With the dependencies of this interpreter, and a folder of the wheel's files in place of the checkout."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    empty.mkdir()

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # `-P` leaves the current folder out of the path. The checkout may be on this interpreter's path too.
        paths = [str(site), *(path for path in sys.path if path and not (pathlib.Path(path) / "setup.py").exists())]
        start = f"import sys; sys.path[:0] = {paths}; sys.argv[0] = 'diffusion-tf'; {program}"
        return subprocess.run(
            [sys.executable, "-P", "-c", start, *arguments], cwd=empty, capture_output=True, text=True, check=False
        )

    main = "from diffusion_tf.experiments.__main__ import main; sys.exit(main())"
    listed = call(main, "--help")
    assert listed.returncode == 0, listed.stderr
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        assert path.stem == "common" or path.stem in listed.stdout
    config = call(main, "train", "--dataset=cifar10", "--dry_run")
    assert config.returncode == 0, config.stderr
    assert "parameters: 35,746,307" in config.stdout
    wrong = call(main, "train", "--dataset=mnist", "--dry_run")
    assert wrong.returncode == 1 and "--dataset=mnist: choose one of" in wrong.stderr
    assert call("import experiments").stderr.endswith("No module named 'experiments'\n")
    assert not list(empty.iterdir())
