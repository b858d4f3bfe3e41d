"""Imports run one way through the house: a module imports only what stands to the left of its room."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ORDER = (
    "errors progress_bar figures ops presets conditioning recipes network_size budgets data_settings rng layers storage"
    " schedules data diffusion_utils unet solvers runtime trained_model calibration samplers inpainting likelihood"
    " compression training evaluation reports interop pretrained run experiments"
).split()
SOURCES = sorted(p.relative_to(ROOT) for room in ("diffusion_tf", "experiments") for p in ROOT.glob(f"{room}/**/*.py"))


def room(module):
    """The room of a dotted module name; the package `diffusion_tf` itself, which imports nothing at once, is None."""
    names = module.split(".")
    if names[0] == "experiments":
        return "experiments"
    return names[1] if names[0] == "diffusion_tf" and len(names) > 1 else None


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path):
    """The modules of this project that a file imports anywhere in its code."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                path = ROOT / name.replace(".", "/")
                yield name if path.is_dir() or path.with_suffix(".py").exists() else base


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_imports_only_what_stands_to_its_left(path):
    here = room(module_name(path))
    if here is None:  # the public API, whose imports happen when a name is first used
        return
    for name in imported_modules(path):
        there = room(name)
        if there and there != here:
            assert ORDER.index(there) < ORDER.index(here), f"{path} imports {name}"


def test_every_room_has_its_place():
    assert {room(module_name(path)) for path in SOURCES} - {None} == set(ORDER)


def test_only_ops_knows_how_a_cpu_computes():
    for path in SOURCES:
        names = set(imported_modules(path))
        if room(module_name(path)) != "ops":
            assert not {name for name in names if name.startswith("diffusion_tf.ops.cpu")}, path
        if room(module_name(path)) not in ("ops", "runtime"):
            assert "diffusion_tf.ops.backend" not in names, path


def test_programs_are_imported_by_nobody():
    for path in SOURCES:
        if path.parts[0] == "diffusion_tf":
            assert not [name for name in imported_modules(path) if room(name) == "experiments"], path
