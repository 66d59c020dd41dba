"""Consistency of the notebooks, the package and config.yaml."""

import ast
import json
import re
import subprocess
from pathlib import Path

from pillsnap.config.schema import LEAF_KEYS

ROOT = Path(__file__).parents[1]
GENERIC = {f"config/{name}.py" for name in ("training", "schema", "layers", "load")}  # they use no setting themselves


def names_read(file: Path) -> tuple[set[str], set[str]]:
    """Attributes that a module reads, and all its names (attributes, variables, parameters)."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    variables = {node.id for node in nodes if isinstance(node, ast.Name)}
    return attributes, attributes | variables | {node.arg for node in nodes if isinstance(node, ast.arg)}


def test_no_setting_is_dead():
    """Each setting is an attribute in a module that also has the name of its section.

    For example `settings.train` or `train: Train`.
    """
    package = ROOT / "pillsnap"
    files = [file for file in package.rglob("*.py") if file.relative_to(package).as_posix() not in GENERIC]
    modules = [names_read(file) for file in files]
    dead = []
    for key in LEAF_KEYS:
        section, _, name = key.rpartition(".")
        section = section.split(".")[0]
        if not any(name in attributes and (not section or section in known) for attributes, known in modules):
            dead.append(key)
    assert not dead, f"nothing reads {', '.join(dead)}"


def test_every_key_has_its_type_and_meaning():
    """Each value line of config.yaml reads `key: value  # (type) meaning`.

    Blocks of profiles and stages repeat keys explained above.
    """
    settings = (ROOT / "config.yaml").read_text(encoding="utf-8").split("\nprofiles:")[0]
    lines = [line for line in settings.splitlines() if line.strip() and not line.startswith("#")]
    section = re.compile(r"^ *\w+:( +#.*)?$")
    value = re.compile(r"^ *\w+: +\S.* # \([^()]+\) \S")
    undocumented = [line for line in lines if not section.match(line) and not value.match(line)]
    assert not undocumented, f"without `# (type) meaning`: {undocumented}"
    assert sum(bool(value.match(line)) for line in lines) == len(LEAF_KEYS)


def notebooks() -> list[Path]:
    """All notebooks of the project."""
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def cells(book: Path, kind: str) -> list[dict]:
    """Cells of one kind."""
    return [cell for cell in json.loads(book.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """Text of a cell."""
    return "".join(cell["source"])


def test_every_module_has_its_notebook_and_every_chapter_its_module():
    exported = {
        re.search(r"#\| *default_exp +(\S+)", source(cell)).group(1)
        for book in notebooks()
        for cell in cells(book, "code")
        if "default_exp" in source(cell)
    }
    modules = {
        ".".join(path.relative_to(ROOT / "pillsnap").with_suffix("").parts)
        for path in (ROOT / "pillsnap").rglob("*.py")
    }
    modules = {name for name in modules if not name.split(".")[-1].startswith("_")}
    assert modules == exported


def test_run_notebooks_have_parameters_and_export_nothing():
    runs = [book for book in notebooks() if book.parent == ROOT / "nbs" and re.match(r"1\d_", book.name)]
    assert {book.name for book in runs} >= {"10_train.ipynb", "11_evaluate.ipynb", "12_export.ipynb"}
    for book in runs:
        tagged = [cell for cell in cells(book, "code") if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1, f"{book.name} needs one cell with the tag parameters, or papermill runs its defaults"
        names = re.findall(r"^(\w+)(?:: *\w+)? *=", source(tagged[0]), re.M)
        checks = [source(cell) for cell in cells(book, "code") if "check_parameters(" in source(cell)]
        assert checks and all(f'"{name}"' in checks[0] for name in names), f"{book.name} does not check its parameters"
        code = "\n".join(source(cell) for cell in cells(book, "code"))
        assert "#| export" not in code and "default_exp" not in code
        assert not re.search(r"^(def|class) ", code, re.M), f"{book.name} defines something: that belongs to a chapter"


def test_every_notebook_has_the_default_kernel():
    for book in notebooks():
        assert json.loads(book.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3", book.name


def test_no_notebook_has_an_error_or_a_local_path():
    for book in notebooks():
        for cell in cells(book, "code"):
            text = json.dumps(cell.get("outputs", []))
            assert '"output_type": "error"' not in text, book.name
            assert not re.search(r"/(home|root|work|Users)/\w", text), f"{book.name}: {text[:200]}"


def test_package_imports_neither_nbdev_nor_fastcore():
    for path in (ROOT / "pillsnap").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert path.name == "_modidx.py" or not {name.split(".")[0] for name in names} & {
                "nbdev",
                "fastcore",
                "execnb",
            }, path


def test_lines_hold_at_most_120_characters():
    """Sources and texts; tables of Markdown, addresses and what nbdev itself writes (`__all__`) can't be broken."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    long = []
    for name in tracked.splitlines():
        path = ROOT / name
        if path.suffix == ".ipynb":
            text = "\n".join(source(cell) for kind in ("code", "markdown") for cell in cells(path, kind))
        elif path.suffix in (".py", ".md", ".yaml", ".ini", ".toml", ".sh", ".js", ".css") and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            continue
        generated = re.compile(r"^(__all__ = \[| {11}')") if name.startswith("pillsnap/") else re.compile("(?!)")
        long += [
            f"{name}: {line[:100]}..."
            for line in text.splitlines()
            if len(line) > 120
            and path.name != "_modidx.py"
            and not (line.startswith("|") or "://" in line or generated.match(line))
        ]
    assert not long, "\n".join(long)
