"""Layers of the package: allowed imports, modules per folder, numbers of the notebooks."""

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pillsnap.errors import PillsnapError

ROOT = Path(__file__).parents[1]
MAX_MODULES = 14

# Layers from the bottom up: a layer imports only from layers above it in this list.
LAYERS = [
    ["errors"],
    ["atomic"],
    ["config"],
    ["provenance"],
    ["progress"],
    ["runlog"],
    ["runs"],
    ["comparison"],
    ["runtime"],
    ["answer"],
    ["metrics"],
    ["data", "sample"],
    ["models"],
    ["masks"],
    ["training"],
    ["quality"],
    ["evaluation"],
    ["export"],
    ["color"],
    ["registry", "packaging"],
    ["service"],
    ["serve"],
    ["scale"],
    ["bench"],
    ["demo"],
    ["commands"],
    ["cli"],
]
# Subpackages of a package in the same order; "" stands for the modules of the package itself.
SUBPACKAGES = {
    "runtime": ["", "color"],
    "answer": ["color", "shapes", "verdicts", "", "gallery", "quality", "search", "imprint"],
    "color": ["networks", "data", "tasks", ""],
    "data": ["reading", "labelling", "readers", "scan", "splits", "cache", ""],
    "training": ["device", "report", ""],
    "quality": ["ranking", "pairs", "degradations", ""],
    "service": ["", "jobs", "guard", "inference", "page", "endpoints", "client"],
    "bench": [
        "",
        "data",
        "training",
        "engines",
        "gpu",
        "serving",
        "quality",
        "color",
        "rules",
        "masks",
        "search",
        "gallery",
        "registry",
        "scale",
    ],
    "scale": ["ray", "jobs", ""],
}
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}


def module_names() -> dict[str, Path]:
    """Map every module, as `data.readers.yolo`, to its file."""
    files = sorted((ROOT / "pillsnap").rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT / "pillsnap").with_suffix("").parts): path
        for path in files
        if not path.name.startswith("_")
    }


def chapters() -> dict[str, Path]:
    """Map every module to the notebook that exports it."""
    found = {}
    for book in sorted((ROOT / "nbs").rglob("*.ipynb")):
        match = re.search(r"#\| *default_exp +([\w.]+)", book.read_text(encoding="utf-8"))
        if match and ".ipynb_checkpoints" not in book.parts:
            found[match.group(1)] = book
    return found


def number_of(book: Path) -> int:
    """Get the number at the start of a notebook's file name."""
    return int(book.name.split("_")[0])


def imported(path: Path, module: str, known: set[str]) -> Iterator[str]:
    """Find the modules that a file imports: relative and absolute, at the top and inside functions."""
    package = ["pillsnap", *module.split(".")][:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "pillsnap":
                continue
            while len(parts) > 1 and ".".join(parts[1:]) not in known:
                parts.pop()
            if len(parts) > 1:
                yield ".".join(parts[1:])


def imports() -> list[tuple[str, str]]:
    """List every import inside the package: importing module, imported module."""
    modules = module_names()
    return [
        (module, other)
        for module, path in modules.items()
        for other in imported(path, module, set(modules))
        if other != module
    ]


def subpackage(module: str) -> str:
    """Get the subpackage of a module, "" for a module of the package itself."""
    return module.split(".")[1] if module.count(".") == 2 else ""


def test_all_kinds_of_imports_are_found():
    """Relative and absolute, at the top and inside functions, and of a module from its package."""
    found = set(imports())
    assert ("service.endpoints.predict", "service.endpoints.dependencies") in found  # relative, at the top
    assert ("commands.export", "evaluation.gate") in found  # absolute, inside a function
    assert ("commands.data", "data.cache.open") in found  # `from pillsnap.data.cache import open`


def test_every_module_has_a_layer_and_a_subpackage():
    for module in module_names():
        package = module.split(".")[0]
        assert package in LAYER, f"{module}: {package} is missing in LAYERS"
        assert module.count(".") <= 2, f"{module} lies deeper than a subpackage"
        assert subpackage(module) in SUBPACKAGES.get(package, [""]), f"{module}: its folder is missing in SUBPACKAGES"


def test_packages_import_only_from_lower_layers():
    wrong = [
        f"{module} imports {other}"
        for module, other in imports()
        if (package := module.split(".")[0]) != (source := other.split(".")[0]) and LAYER[source] >= LAYER[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_subpackages_import_only_from_earlier_subpackages():
    wrong = []
    for module, other in imports():
        package = module.split(".")[0]
        if package in SUBPACKAGES and other.split(".")[0] == package and subpackage(module) != subpackage(other):
            order = SUBPACKAGES[package].index
            if order(subpackage(other)) > order(subpackage(module)):
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_notebooks_import_only_from_notebooks_with_a_smaller_number():
    """Inside one folder; those of the top level belong to layers, which have their own test."""
    books = chapters()
    wrong = [
        f"{books[module].name} imports {books[other].name}"
        for module, other in imports()
        if "." in module
        and module.rpartition(".")[0] == other.rpartition(".")[0]
        and number_of(books[other]) >= number_of(books[module])
    ]
    assert not wrong, "\n".join(wrong)


def test_notebooks_lie_in_the_folder_of_their_module():
    wrong = []
    for module, book in chapters().items():
        folder, _, name = module.rpartition(".")
        expected = "/".join([*filter(None, folder.split(".")), f"{book.name.split('_')[0]}_{name}.ipynb"])
        if book.relative_to(ROOT / "nbs").as_posix() != expected:
            wrong.append(f"{book.relative_to(ROOT)} exports {module}: it should be nbs/{expected}")
    assert not wrong, "\n".join(wrong)


def test_numbers_are_unique_inside_a_folder():
    books = [book for book in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in book.parts]
    counts = Counter((book.parent.relative_to(ROOT).as_posix(), number_of(book)) for book in books)
    assert not [f"{folder}: {number}" for (folder, number), count in counts.items() if count > 1]


def test_folders_hold_a_limited_number_of_modules():
    counts = Counter(module.rpartition(".")[0] for module in module_names())
    full = {folder: count for folder, count in counts.items() if count > MAX_MODULES}
    assert not full, f"more than {MAX_MODULES} modules: {full}"


OTHER_ERRORS = {
    "service.errors.ApiError": "a response of HTTP, which FastAPI sends",
    "bench.training.ultralytics_loop.StopTraining": "leaves the loop of a trainer that is not ours",
}


def test_errors_that_the_user_can_mend_have_one_base():
    """Commands print the message of a `PillsnapError`; another error class would end them with a traceback."""
    found = {"errors.PillsnapError"}
    for module in set(module_names()) - {"serve"}:  # importing it starts the service
        for value in vars(importlib.import_module(f"pillsnap.{module}")).values():
            if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == f"pillsnap.{module}":
                found.add(f"{module}.{value.__name__}")
                if f"{module}.{value.__name__}" not in OTHER_ERRORS:
                    assert issubclass(value, PillsnapError), f"{module}.{value.__name__} is no PillsnapError"
    assert len(found) > 25 and found >= set(OTHER_ERRORS)
