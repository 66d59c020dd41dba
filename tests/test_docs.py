"""README, CONTRIBUTING and docs: both languages agree, and what the texts name exists."""

import ast
import importlib
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from test_architecture import LAYERS
from tiny_models import KEY, RIGHT, RULES, photo_jpeg, save_classifier

import pillsnap.commands.export as commands
import pillsnap.export.formats as formats
import pillsnap.runtime.engines as engines
from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.config.environment import Environment
from pillsnap.config.schema import LEAF_KEYS, Settings
from pillsnap.data.readers import layouts
from pillsnap.export.onnx import Source
from pillsnap.serve import create_app
from pillsnap.service.endpoints import routers
from pillsnap.training import schedule

ROOT = Path(__file__).parents[1]
README, KOREAN, CONTRIBUTING = ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, KOREAN, CONTRIBUTING, *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SECTIONS = "|".join({key.split(".")[0] for key in LEAF_KEYS if "." in key})
each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """A text without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def headings(path: Path) -> list[tuple[int, str]]:
    """Level and title of every heading."""
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(path), re.M)]


def links(path: Path) -> list[str]:
    """Targets of all links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def spans(path: Path) -> list[str]:
    """Everything in single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and content of every code block."""
    return FENCE.findall(path.read_text(encoding="utf-8"))


def code_lines(path: Path) -> list[str]:
    """Lines of all code blocks, without comments, continued lines joined."""
    code = "\n".join(content for _, content in blocks(path)).replace("\\\n", " ")
    return [line for text in code.splitlines() if (line := without_comment(text))]


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#.*$", "", line).rstrip()


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as code hosts make them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(path)}


def table_numbers(path: Path) -> list[list[str]]:
    """Numbers of each table row; languages may order them differently."""
    rows = re.findall(r"^\|.*$", prose(path), re.M)
    return [sorted(re.findall(r"\d(?:[\d.,]*\d)?", row)) for row in rows]


# Both languages


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_both_languages_have_the_same_structure():
    assert [level for level, _ in headings(README)] == [level for level, _ in headings(KOREAN)]
    assert sorted(links(README)) == sorted(links(KOREAN))
    assert table_numbers(README) == table_numbers(KOREAN)


def test_both_languages_have_the_same_code():
    english, korean = (
        [(language, [without_comment(line) for line in code.splitlines()]) for language, code in blocks(path)]
        for path in (README, KOREAN)
    )
    assert english == korean and len(english) > 4


# What the texts name


@each_text
def test_links_lead_somewhere(path: Path):
    broken = []
    for target in links(path):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (path.parent / file).resolve() if file else path
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


def test_readme_links_every_page():
    linked = {target.partition("#")[0] for target in links(README)}
    assert {f"docs/{page.name}" for page in PAGES} <= linked


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_begin_with_a_sentence(path: Path):
    title, empty, sentence = path.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ") and not empty and re.match(r"[A-Z]\w+ ", sentence)


@each_text
def test_paths_exist(path: Path):
    words = [word for text in (*spans(path), *code_lines(path)) for word in text.split()]
    folders = re.compile(r"(nbs|pillsnap|tests|docs|operation|examples)/[\w./-]*")
    named = {word for word in words if folders.fullmatch(word)}
    named |= {f"nbs/**/{word}.ipynb" for word in words if re.fullmatch(r"\d\d_[a-z_]+", word)}
    named |= {f"tests/{word}" for word in words if re.fullmatch(r"test_\w+\.py", word)}
    named |= {word for word in words if re.fullmatch(r"Dockerfile[.\w]*|[\w.]+\.(txt|toml|ini)|\.env\.\w+", word)}
    assert not [name for name in named if not any(ROOT.glob(name.rstrip("/")))]


@each_text
def test_make_targets_exist(path: Path):
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    command = re.compile(r"(?:^|&& )make ([\w./-]+)")
    named = {target for text in (*spans(path), *code_lines(path)) for target in command.findall(text)}
    assert named <= targets


def top_level_names(file: Path) -> set[str]:
    """Names that a module defines, without importing it."""
    found: set[str] = set()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in [*body, *(inner for block in body if isinstance(block, ast.If) for inner in block.body)]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_module_or_name(dotted: str) -> bool:
    """Whether a dotted name is a package, a module, or a name in a module."""
    place = ROOT.joinpath(*dotted.split("."))
    file = place.with_suffix(".py")
    if file.is_file() or (place / "__init__.py").is_file():
        return True
    files = [file for file in (place.parent.with_suffix(".py"), place.parent / "__init__.py") if file.is_file()]
    return any(place.name in top_level_names(file) for file in files)


@each_text
def test_modules_exist(path: Path):
    named = {span.replace(":", ".") for span in spans(path) if re.fullmatch(r"pillsnap(\.\w+)+(:\w+)?", span)}
    for line in code_lines(path):
        named |= {
            name.replace(":", ".") for name in re.findall(r"(?:-m|uvicorn|^import) (pillsnap(?:\.\w+)+(?::\w+)?)", line)
        }
        for module, names in re.findall(r"from (pillsnap[\w.]*) import (.+)", line):
            named |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert not [name for name in named if not is_module_or_name(name)]


def commands_in(texts: Iterable[str]) -> list[list[str]]:
    """Words after `pillsnap` of the texts that call it."""
    call = re.compile(r"(?:[A-Z]\w*=\S+ )*(?:/opt/pillsnap/bin/|python -m )?pillsnap ([a-z].*)")
    return [shlex.split(match[1]) for text in texts if (match := call.match(text))]


@each_text
def test_commands_exist_with_their_options(path: Path):
    for words in commands_in(code_lines(path)):
        cli.parse(words)  # ends the test where it ends the command
    settings = {"--cfg", "--stage", "--profile", "--data-root"}
    for name, *words in commands_in(spans(path)):
        known = {option for names, _ in cli.OPTIONS.get(name, ()) for option in names} | settings
        assert name in cli.COMMANDS and {word for word in words if word.startswith("--")} <= known, (name, words)


@each_text
def test_settings_exist(path: Path):
    named = {
        re.split("[=:]", span)[0].replace("…", "*")
        for span in spans(path)
        if re.fullmatch(rf"({SECTIONS})\.[a-z_.*…0-9]+([=:].*)?", span) and not span.endswith(".yaml")
    }
    named |= {key for line in code_lines(path) for key in re.findall(rf"\s((?:{SECTIONS})\.[a-z_.0-9]+)=", line)}
    assert not [key for key in named if not any(fnmatch(leaf, key) for leaf in LEAF_KEYS)]


def test_tree_of_files_exists():
    tree = next(code for _, code in blocks(README) if code.startswith("nbs/"))
    for line in tree.splitlines():
        name, _, comment = line.strip().partition("#")
        place = (ROOT / "pillsnap" if line.startswith(" ") else ROOT) / name.strip()
        assert place.exists(), line
        for word in re.findall(r"\b[a-z_]+(?:/|\.py\b)", comment):
            assert (place / word).exists() or (place.parent / word).exists(), f"{line}: {word}"
    rooms = {path.name for path in (ROOT / "pillsnap").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(re.findall(r"^  (\w+)/", tree, re.M))


def test_layers_are_those_of_the_package():
    listed = next(code for _, code in blocks(CONTRIBUTING) if code.startswith("errors"))
    assert re.findall(r"\w+", listed) == [name for layer in LAYERS for name in layer]


# The examples of CONTRIBUTING.md


def example(title: str, *chapter: ModuleType) -> dict[str, object]:
    """Run the code block under a heading, in the namespace of the chapter that it belongs to; returns its names."""
    text = CONTRIBUTING.read_text(encoding="utf-8").split(f"### {title}\n")[1]
    names: dict[str, object] = {"__name__": "example"}
    for module in chapter:
        names |= {key: value for key, value in vars(module).items() if not key.startswith("__")}
    exec(FENCE.search(text)[2], names)
    return names


def test_example_of_a_plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "SCHEDULES", {**schedule.SCHEDULES})
    example("A plugin")
    rates = [schedule.learning_rate_factor("linear", seen, 0.1) for seen in (0, 0.1, 1)]
    assert rates == pytest.approx([0.01, 1, 0.01])


def test_tables_for_plugins_exist():
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| `(pillsnap[\w.]+)` \| (.+) \|$", prose(CONTRIBUTING), re.M)
    assert len(rows) == 9
    for tables, module, _ in rows:
        names = re.findall(r"\w+", tables)
        assert all(isinstance(getattr(importlib.import_module(module), name), dict) for name in names), tables


def test_example_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sheet = example("A reader")["SHEET"]
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("a.png,aspirin\n\nb.png,biotin\nc.png,aspirin\nd.png,biotin\n")
    readers = {**layouts.READERS}
    folders = readers.pop("folders")
    monkeypatch.setattr(layouts, "READERS", {**readers, "sheet": sheet, "folders": folders})
    result = layouts.read_all(tmp_path)
    assert [record.code for record in result.records] == ["aspirin", "biotin"]
    assert result.summary()["files"] == {"found": 4, "used": 3, "skipped": 0, "quarantined": 1}
    assert result.records[0].source == sheet.name == "sheet"
    assert [Path(found.image).name for found in result.quarantined] == ["c.png", "d.png"]


def test_example_of_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS})
    written = example("An export format", formats)["FORMATS"]["onnx-gz"]
    save_classifier(tmp_path)
    written.write(Source("classifier", None, RULES.classifier_size, {}), tmp_path / written.files("classifier")[0])
    assert (tmp_path / "classifier.onnx.gz").is_file()
    assert written.open(tmp_path / "classifier.onnx.gz")[1]["task"] == "classifier"


def test_example_of_an_engine(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES})
    monkeypatch.setattr("pillsnap.answer.factory.ENGINES", engines.ENGINES)
    example("An engine", engines)
    assert engines.choose_engine(models, "onnxruntime-one").choice == "onnxruntime-one"
    assert load_identifier(models, engine="onnxruntime-one").detect is not None


def test_example_of_an_endpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routers, "ROUTERS", {**routers.ROUTERS})
    example("An endpoint")
    client = TestClient(create_app(Settings(), Environment((RIGHT,))))
    assert client.get("/limits").status_code == 401
    assert client.get("/limits", headers=KEY).json() == {"image_mb": 20.0, "megapixels": 65.0}


def test_example_of_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(cli.OPTIONS, "formats", raising=False)  # the end of the test takes it away again
    command = example("A command", commands)["formats"]
    monkeypatch.setitem(cli.COMMANDS, "formats", command)
    for words, shown in (([], '"onnx": "serving'), (["--names"], '"onnx",')):
        arguments = cli.parse(["formats", *words])
        assert isinstance(arguments, Namespace) and arguments.action(arguments) == 0
        assert shown in capsys.readouterr().out


def test_example_in_python(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photo.jpg").write_bytes(photo_jpeg())
    code = next(content for language, content in blocks(README) if language == "python")
    code = code.replace("runs/first/export", str(models)).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("K-000030 White round tablet 100% identified Box(")
