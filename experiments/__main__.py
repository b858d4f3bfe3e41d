"""Runs a program by its name: `python -m experiments NAME FLAGS`, or installed `diffusion-tf NAME FLAGS`."""

import ast
import pathlib
import runpy
import sys

_ALIASES = {"import": "import_checkpoint"}


def _descriptions() -> dict[str, str]:
    """The first line of each program's docstring, by its name; imports no program."""
    paths = sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in paths}


def main() -> None:
    """Runs the program that the first argument names; lists the programs without one, or for --help."""
    programs = _descriptions()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print("Denoising diffusion probabilistic models. NAME --help tells the flags of a program.\n")
        for program, description in programs.items():
            print(f"  {program:<18} {description}")
        return
    name = _ALIASES.get(name, name)
    if name not in programs:
        sys.exit(f"diffusion-tf: there is no program {name}; choose one of {', '.join(programs)}")
    del sys.argv[1]
    runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
