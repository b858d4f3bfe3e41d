"""README.md and docs/ agree with the code: what they name exists, and their Python blocks run."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_programs import ROOT, start_fork
from support.gcloud import NOT_FOR_USERS

from diffusion_tf.presets import PRESETS, get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import TrainState

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py") if path.stem != "common")
SCRIPTS = sorted({path.stem for path in (ROOT / "tpu_scripts").glob("*.sh")} - NOT_FOR_USERS)
OTHER_COMMANDS = ("tensorboard", "tfds", "head")  # not of this project
FOLDERS = ("diffusion_tf", "experiments", "tests", "docs", "tpu_scripts")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

Flags = dict[str, dict[str, tuple[str, ...]]]  # program or script -> flag -> its choices, or none


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def spans(text: str) -> list[str]:
    """The inline code of a page."""
    return SPAN.findall(FENCE.sub("", text))


def is_command(span: str) -> bool:
    return span.split()[0] in ("diffusion-tf", "make", "sh", "pip", "python", ".venv/bin/python", *OTHER_COMMANDS)


def commands(text: str) -> list[list[str]]:
    """The words of every command: lines of sh blocks, and inline code that begins with a command."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in [*lines, *filter(is_command, spans(text))]]
    return [words for words in found if words]


@pytest.fixture(scope="module")
def flags() -> Flags:
    """The flags of every program, from its --help, and of every script, from the cases that read its arguments."""
    forks = {program: start_fork(program, "--help") for program in PROGRAMS}
    found: Flags = {}
    for script in SCRIPTS:
        text = (ROOT / f"tpu_scripts/{script}.sh").read_text()
        text += (ROOT / "tpu_scripts/common.sh").read_text() if "common_flag" in text else ""
        found[f"{script}.sh"] = dict.fromkeys(re.findall(r"^ +--(\w+)(?:=\*)?\)", text, re.MULTILINE), ())
    for program, fork in forks.items():
        shown = fork.wait().stdout
        found[program] = {"help": ()}
        for negatable, name, choices in re.findall(
            r"^ +(?:-\?,)?--(\[no\])?(\w+): *(?:<([^>]*)>:)?", shown, re.MULTILINE
        ):
            found[program][name] = tuple(choices.split("|")) if choices else ()
            if negatable:
                found[program][f"no{name}"] = ()
        if "dataset" in found[program]:
            found[program]["dataset"] = tuple(PRESETS)
    assert all(len(known) > 1 for known in found.values()), found
    return found


def flag_problems(words: list[str], known: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for word in words:
        if not word.startswith("--"):
            continue
        name, _, value = word.removeprefix("--").partition("=")
        if name not in known:
            yield f"no flag --{name}"
        elif known[name] and value and not value.isupper() and value not in known[name]:
            yield f"--{name} is one of {known[name]}, not {value}"


def command_problems(words: list[str], flags: Flags) -> Iterator[str]:
    """What is wrong with a command."""
    head, *rest = words
    if head in ("python", ".venv/bin/python") and rest[:2] == ["-m", "experiments"]:
        head, rest = "diffusion-tf", rest[2:]
    if head == "diffusion-tf":
        if rest[0] == "NAME":
            return
        if rest[0] not in flags or rest[0].endswith(".sh"):
            yield f"no program {rest[0]}"
            return
        yield from flag_problems(rest[1:], flags[rest[0]])
    elif head == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        bench = (ROOT / "tests/benchmarks/bench.py").read_text()
        for word in rest:
            if word.startswith("BENCH="):
                named = [part for part in shlex.split(word.removeprefix("BENCH=")) if part.startswith("--")]
                yield from (f"bench.py has no {flag}" for flag in named if f'"{flag}"' not in bench)
            elif word not in targets:
                yield f"no target {word}"
    elif head == "sh":
        path = Path(rest[0])
        if path.parent.name != "tpu_scripts" or path.name not in flags:
            yield f"no script {path}"
            return
        own, separator, passed_on = (rest, None, []) if "--" not in rest else _split(rest)
        yield from flag_problems(own[1:], flags[path.name])
        if separator:
            program = "train_exported" if "--runner=jax" in own else path.stem
            yield from flag_problems(passed_on, flags[program])
    elif head == "pip":
        for extra in [
            name for word in rest for names in re.findall(r"^\.\[(.+)\]$", word) for name in names.split(",")
        ]:
            if f'"{extra}": [' not in (ROOT / "setup.py").read_text():
                yield f"no extra {extra}"
    elif head == "python":
        if not (ROOT / rest[0]).is_file():
            yield f"no file {rest[0]}"
    elif head not in OTHER_COMMANDS:
        yield f"unknown command {head}"


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    place = words.index("--")
    return words[:place], "--", words[place + 1 :]


def prose_flag_problems(text: str, flags: Flags) -> Iterator[str]:
    """Flags in inline code that no program or script has, or that no program has with this value."""
    for span in spans(text):
        if is_command(span) or not span.startswith("--"):
            continue
        word = span.split()[0]
        having = [known for known in flags.values() if word.removeprefix("--").partition("=")[0] in known]
        if all(list(flag_problems([word], known)) for known in having):
            yield f"no program has {word}"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(text: str, folder: Path) -> Iterator[str]:
    for target in LINK.findall(FENCE.sub("", text)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        if not (folder / path).exists():
            yield f"no file {target}"
        elif anchor and anchor not in anchors(folder / path):
            yield f"no heading {target}"


@functools.cache
def definitions(path: Path) -> set[str]:
    """The names that a module defines, with those of its classes as Class.name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


def path_problems(text: str) -> Iterator[str]:
    """Files of this project, and `file.py:name` of the package, that do not exist."""
    for span in spans(text):
        if reference := re.fullmatch(r"([\w/]+\.py):([\w.]+)", span):
            path = ROOT / "diffusion_tf" / reference[1]
            if not path.is_file():
                yield f"no module {span}"
            elif reference[2] not in definitions(path):
                yield f"no definition {span}"
        elif re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w/.]+", span) and not (ROOT / span).exists():
            yield f"no file {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_flags_links_and_paths_exist(page, flags):
    text = page.read_text()
    problems = [
        f"{problem}: {' '.join(words)}" for words in commands(text) for problem in command_problems(words, flags)
    ]
    problems += [*prose_flag_problems(text, flags), *link_problems(text, page.parent), *path_problems(text)]
    assert not problems, "\n".join(problems)


def test_the_pages_name_commands_links_and_paths():
    texts = [page.read_text() for page in PAGES]
    assert len(PAGES) > 12
    assert sum(len(commands(text)) for text in texts) > 70
    assert sum(span.startswith("--") for text in texts for span in spans(text)) > 60
    assert sum(len(LINK.findall(text)) for text in texts) > 30
    assert sum(len(re.findall(r"`[\w/]+\.py:\w", text)) for text in texts) > 40
    assert sum(len(blocks(text, "python")) for text in texts) > 7
    named = {words[1] for text in texts for words in commands(text) if words[0] == "diffusion-tf"}
    assert named - {"NAME"} == set(PROGRAMS) - {"__main__"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`diffusion-tf smaple --workdir=d`", "no program smaple"),
        ("```sh\ndiffusion-tf sample \\\n  --steps=5\n```", "no flag --steps"),
        ("`python -m experiments sample --sampler=euler`", "--sampler is one of"),
        ("`diffusion-tf train --dataset=mnist`", "--dataset is one of"),
        ("`make tests`", "no target tests"),
        ("`make bench BENCH='--slow'`", "bench.py has no --slow"),
        ("`sh tpu_scripts/crate.sh`", "no script tpu_scripts/crate.sh"),
        ("`sh tpu_scripts/create.sh --size=3`", "no flag --size"),
        ("`sh tpu_scripts/train.sh --name=a -- --name=b`", "no flag --name"),
        ("`pip install '.[cpu,jax]'`", "no extra jax"),
        ("```sh\npython tests/none.py\n```", "no file tests/none.py"),
        ("```sh\ncurl x\n```", "unknown command curl"),
        ("Set `--warmup`.", "no program has --warmup"),
        ("Set `--sampler=ddim` or `--sampler=euler`.", "no program has --sampler=euler"),
        ("[x](docs/none.md)", "no file docs/none.md"),
        ("[x](docs/training.md#none)", "no heading docs/training.md#none"),
        ("`unet.py:VNet`", "no definition unet.py:VNet"),
        ("`unet/none.py:VNet`", "no module unet/none.py:VNet"),
        ("`diffusion_tf/none.py`", "no file diffusion_tf/none.py"),
    ],
)
def test_what_does_not_exist_is_found(text, problem, flags):
    found = [p for words in commands(text) for p in command_problems(words, flags)]
    found += [*prose_flag_problems(text, flags), *link_problems(text, ROOT), *path_problems(text)]
    assert [p for p in found if p.startswith(problem)] and len(found) == 1, found


def _numbers(kind: str, cell: str) -> set[int]:
    """The numbers after a word: {16, 23, 24, 25, 26} of "Eqs. 16 and 23-26, the bound"."""
    found = re.match(rf"{kind} ((?:\d+(?:-\d+)?(?:, | and )?)+)", cell)
    ranges = [part.split("-") for part in re.findall(r"\d+(?:-\d+)?", found[1])] if found else []
    return {number for first, *last in ranges for number in range(int(first), int((last or [first])[0]) + 1)}


@pytest.mark.parametrize(
    ("kind", "last"),
    [("Eqs?\\.", 26), ("Algorithm", 4), ("Tables?", 4), ("Figures?", 19)],
    ids=lambda value: str(value),
)
def test_the_map_has_all_of_the_paper(kind, last):
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.split("## From the paper to the code")[1].split("\n## ")[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    numbers = [number for cell in cells for number in _numbers(kind, cell)]
    assert sorted(numbers) == list(range(1, last + 1))


def test_pages_are_short_linked_and_begin_with_their_use():
    readme = PAGES[0].read_text()
    assert len(readme.encode()) < 8000
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme, page.name
        assert page.read_text().split("\n\n")[1].startswith("With this page you can "), page.name
    for page in PAGES:
        assert {language for language, _ in FENCE.findall(page.read_text())} <= {"sh", "python", "text"}, page.name
        assert page.read_text().count("```") == 2 * len(FENCE.findall(page.read_text())), page.name


@pytest.fixture
def folder_with_a_run(tmp_path) -> Path:
    """A folder with a run in runs/digits: a smaller network and fewer timesteps than the preset's, initial weights."""
    preset = get_preset("digits", ch_mult=(1,), num_timesteps=50)
    workdir = Workdir(str(tmp_path / "runs/digits"))
    workdir.write_config(preset, None, "")
    state = TrainState(preset, make_strategy("one_device"))
    checkpoints.save(workdir.checkpoints, 0, state.to_arrays())
    return tmp_path


def page_with_blocks(page: Path):
    trains = any(re.search(r"^run = dtf\.train", block, re.MULTILINE) for block in blocks(page.read_text(), "python"))
    return pytest.param(page, marks=pytest.mark.slow if trains else (), id=page.name)


@pytest.mark.parametrize("page", [page_with_blocks(page) for page in PAGES if blocks(page.read_text(), "python")])
def test_python_blocks_run(page, folder_with_a_run, monkeypatch):
    monkeypatch.chdir(folder_with_a_run)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks(page.read_text(), "python")):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), namespace)
