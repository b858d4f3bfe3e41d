"""BUILD has a target for each room, program and test, and each target depends on what its file imports."""

import ast
import importlib.metadata
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("diffusion_tf", "diffusion_tf/compression", "experiments", "tests")
    for path in ROOT.glob(f"{folder}/*.py")
)
PACKAGES = importlib.metadata.packages_distributions()


def targets():
    """{name: attributes} of BUILD, whose syntax is Python's; globs and the like read as None."""

    def value(node):
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None

    calls = [node.value for node in ast.parse((ROOT / "BUILD").read_text()).body if isinstance(node.value, ast.Call)]
    rules = [{keyword.arg: value(keyword.value) for keyword in call.keywords} for call in calls]
    return {rule["name"]: rule for rule in rules if "name" in rule}


def imports(source):
    """The files of this project and the pip targets that a file imports."""
    files, packages = set(), set()
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = name.replace(".", "/")
            files |= {f"{path}.py", f"tests/{path}.py"} & set(SOURCES)
            if not (ROOT / name.split(".")[0]).exists() and name.split(".")[0] in PACKAGES:
                packages.add("@pip//" + PACKAGES[name.split(".")[0]][0].lower().replace("-", "_"))
    return files, packages


def test_every_file_has_a_target_with_its_dependencies():
    rules = targets()
    owner = {
        source: name for name, rule in rules.items() for source in rule.get("srcs") or () if "main.py" not in source
    }
    assert set(SOURCES) - set(owner) == {"tests/pytest_main.py"}
    for source in set(SOURCES) & set(owner):
        files, packages = imports(source)
        wanted = {f":{owner[file]}" for file in files if owner[file] != owner[source]} | packages
        given = set(rules[owner[source]].get("deps") or ())
        assert wanted <= given, f"{source}: {sorted(wanted - given)} missing in BUILD"


def test_every_label_exists():
    rules = targets()
    lock = (ROOT / "requirements.lock").read_text()
    locked = {line.split("==")[0].replace("-", "_") for line in lock.splitlines() if "==" in line}
    for name, rule in rules.items():
        for label in (rule.get("deps") or []) + (rule.get("data") or []):
            if label.startswith("@pip//"):
                assert label.removeprefix("@pip//") in locked, f"{name}: {label}"
            elif label.startswith(":"):
                assert label.removeprefix(":") in rules, f"{name}: {label}"
            else:
                assert (ROOT / label).exists(), f"{name}: {label}"
