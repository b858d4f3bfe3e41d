"""BUILD has a target for each room, module, program and test, and each target depends on what its files import."""

import ast
import graphlib
import importlib.metadata
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("diffusion_tf", "experiments", "tests")
SOURCES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
# Other packages, of which nothing here imports any, share the name `google` with protobuf.
PACKAGES = {**importlib.metadata.packages_distributions(), "google": ["protobuf"]}


def load_rules():
    """{name: attributes} of BUILD, which is run as the Python that its syntax also is."""
    rules = {}

    def rule(*, name, **attributes):
        assert name not in rules, name
        rules[name] = attributes

    def glob(patterns, exclude=()):
        paths = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()}
        return sorted(paths - set(exclude))

    ignored = dict.fromkeys(("load", "package"), lambda *_, **__: None)
    kinds = dict.fromkeys(("py_library", "py_binary", "py_test"), rule)
    exec((ROOT / "BUILD").read_text(), {"glob": glob, **ignored, **kinds})
    return rules


RULES = load_rules()


def owners():
    """{source: name of its target}; a test's runner belongs to all tests."""
    owner = {}
    for name, rule in RULES.items():
        for source in rule["srcs"]:
            if source != "tests/pytest_main.py":
                assert source not in owner, f"{source} is in {owner[source]} and {name}"
                owner[source] = name
    return owner


def walk(tree):
    """The nodes of a syntax tree, but for what only type checkers read: the public API names what it imports later."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from walk(node)


def imports(source):
    """The files of this project and the pip targets that a file imports."""
    package = pathlib.PurePath(source).parent.parts
    files, packages = {"diffusion_tf/__init__.py"} if package[0] != "tests" else set(), set()
    for node in walk(ast.parse((ROOT / source).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            path = name.replace(".", "/")
            files |= {f"{path}.py", f"{path}/__init__.py", f"tests/{path}.py"} & set(SOURCES)
            top = name.split(".")[0]
            if top in PACKAGES and not list(ROOT.glob(f"{top}/")) + list(ROOT.glob(f"tests/**/{top}.py")):
                packages.add("@pip//" + PACKAGES[top][0].lower().replace("-", "_"))
    return files, packages


def test_every_file_belongs_to_one_target():
    assert set(SOURCES) - set(owners()) == {"tests/pytest_main.py"}


def test_targets_depend_on_what_their_files_import():
    owner = owners()
    for name, rule in RULES.items():
        wanted = set()
        for source in set(rule["srcs"]) - {"tests/pytest_main.py"}:
            files, packages = imports(source)
            wanted |= {f":{owner[file]}" for file in files if owner[file] != name} | packages
        given = set(rule.get("deps", ()))
        shared = given & {":programs", ":test_support"}  # their dependencies serve all programs and all tests
        if shared or name in ("programs", "test_support", "benchmarks"):
            given |= {dep for label in shared for dep in RULES[label[1:]]["deps"]}
            assert wanted <= given, f"{name} lacks {sorted(wanted - given)}"
        else:
            assert wanted == given, f"{name}: {sorted(wanted ^ given)}"


def test_no_target_depends_on_itself():
    graph = {name: [dep[1:] for dep in rule.get("deps", ()) if dep[0] == ":"] for name, rule in RULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_every_label_exists():
    lock = (ROOT / "requirements.lock").read_text()
    locked = {line.split("==")[0].replace("-", "_") for line in lock.splitlines() if "==" in line}
    for name, rule in RULES.items():
        for label in [*rule.get("deps", []), *rule.get("data", [])]:
            if label.startswith("@pip//"):
                assert label.removeprefix("@pip//") in locked, f"{name}: {label}"
            elif label.startswith(":"):
                assert label.removeprefix(":") in RULES, f"{name}: {label}"
            else:
                assert (ROOT / label).exists(), f"{name}: {label}"
