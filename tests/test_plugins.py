"""Plugins: a module outside of the package adds to every table, and each addition works by its ordinary command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from conftest import TINY
from fastapi.testclient import TestClient
from tiny_models import CONFIG, KEY, RIGHT, photo_jpeg

from pillsnap import cli
from pillsnap.config import plugins
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings, settings_as_yaml
from pillsnap.config.schema import SettingsError
from pillsnap.data import augment
from pillsnap.data.readers import layouts
from pillsnap.export import formats
from pillsnap.registry.model_info import get_model_info
from pillsnap.runtime import engines
from pillsnap.serve import create_app
from pillsnap.service.endpoints import routers
from pillsnap.training import classifier_task, schedule

ROOT = Path(__file__).parents[1]
TABLES = (
    layouts.READERS,
    classifier_task.LOSSES,
    classifier_task.CLASS_WEIGHTS,
    schedule.SCHEDULES,
    augment.CROP_AUGMENTATIONS,
    augment.PHOTO_AUGMENTATIONS,
    formats.FORMATS,
    engines.ENGINES,
    routers.ROUTERS,
    cli.COMMANDS,
    cli.OPTIONS,
)
TOY = '''
import csv
import gzip
import tempfile
from argparse import Namespace
from collections import Counter
from multiprocessing import current_process
from pathlib import Path

import torch
from fastapi import APIRouter
from torch.nn import functional

from pillsnap.atomic import replacing
from pillsnap.cli import COMMANDS
from pillsnap.commands.options import option, takes
from pillsnap.data.augment import CROP_AUGMENTATIONS
from pillsnap.data.readers.layouts import READERS
from pillsnap.data.reading.reader import Reader
from pillsnap.data.reading.records import PillRecord, ScanResult, Shard, header_size
from pillsnap.export.formats import FORMATS, Format
from pillsnap.runtime.engines import ENGINES, Engine
from pillsnap.runtime.session import open_model
from pillsnap.service.endpoints.routers import ROUTERS, Endpoint
from pillsnap.training.classifier_task import LOSSES

CALLS = Counter()


def read(shard):
    result = ScanResult(notes=[f"read by {current_process().name.split('-')[0]}"])
    with open(shard.paths[0], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pills = Counter(row["image"] for row in rows)
    for row in rows:
        image, code, box = row["image"], row["code"], [float(row[side]) for side in ("x1", "y1", "x2", "y2")]
        kind = "single" if pills[image] == 1 else "combination"
        photo = (image, *header_size(image), kind, "", Path(image).stem)
        result.records.append(PillRecord(*photo, code, code, (), *box, source="toy"))
    result.files_found = result.files_used = len(pills)
    return result


READERS["toy"] = Reader(
    "toy",
    lambda root: False,
    lambda root: [Shard(path.stem, "toy", (str(path),)) for path in sorted(root.glob("*.csv"))],
    read,
    "tables of photos and boxes",
)


def loss(logits, labels, weights, label_smoothing):
    CALLS["loss"] += 1
    return 2 * functional.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing)


def mirrored(images, generator):
    CALLS["augmentation"] += 1
    return images.flip(3) if torch.rand(1, generator=generator) < 0.5 else images


def write_gz(source, path):
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(path.with_name(f"{source.task}.onnx").read_bytes()))


def open_gz(path):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(gzip.decompress(path.read_bytes()))
        model = open_model(file, device="cpu")
    return model, model.metadata


def open_one(path, threads):
    CALLS["engine"] += 1
    return open_model(path, 1, "cpu")


router = APIRouter()


@router.get("/toy")
def answer():
    return {"toy": True}


@takes(option("--word", default="hello"))
def toy(arguments: Namespace) -> int:
    """Print a word."""
    print(arguments.word.upper())
    return 0


LOSSES["toy"] = loss
CROP_AUGMENTATIONS["mirrored"] = mirrored
FORMATS["toy"] = Format("onnx.gz", write_gz, open_gz, "slow lines")
ENGINES["toy"] = Engine("onnx", "onnx", open_one)
ROUTERS["toy"] = Endpoint("mvp", lambda app: router)
COMMANDS["toy"] = toy
'''


def write_project(folder: Path, *modules: str) -> Path:
    """A folder with the settings of this project, and plugins in them."""
    settings = CONFIG.read_text(encoding="utf-8")
    named = settings.replace("\nplugins: []", f"\nplugins: [{', '.join(modules)}]")
    assert named != settings
    (folder / "config.yaml").write_text(named, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with a plugin that adds to every table; what it adds is removed afterwards."""
    before, loaded = [dict(table) for table in TABLES], [*plugins.LOADED]
    folder = write_project(tmp_path_factory.mktemp("project"), "toy_plugin")
    (folder / "toy_plugin.py").write_text(TOY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(folder)
        yield folder
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)
    plugins.LOADED[:] = loaded
    sys.modules.pop("toy_plugin", None)


def write_tables(folder: Path, dataset: Path, parts: int) -> Path:
    """Write a dataset as tables that only the plugin can read."""
    rows = [
        [record.image, record.code, record.x1, record.y1, record.x2, record.y2]
        for record in sorted(layouts.read_all(dataset).records)
    ]
    photos = sorted({row[0] for row in rows})
    for part in range(parts):
        with open(folder / f"part{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "code", "x1", "y1", "x2", "y2"])
            writer.writerows(row for row in rows if row[0] in photos[part::parts])
    return folder


@pytest.fixture(scope="module")
def tables(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few tables that they are read in the process of the test."""
    return write_tables(tmp_path_factory.mktemp("tables"), tiny_data, 2)


@pytest.fixture(scope="module")
def run(project: Path, tables: Path) -> Path:
    """A run on the plugin's dataset, with its loss and its augmentation."""
    chosen = ["data.format=toy", "train.classifier.loss=toy"]
    words = ["--profile", "cpu", "--data-root", str(tables), "--run-dir", str(project / "runs" / "first")]
    assert cli.main(["train", *words, *chosen, *TINY]) == 0
    return project / "runs" / "first"


def test_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--word", "aspirin"]) == 0
    assert capsys.readouterr().out == "ASPIRIN\n"
    assert cli.main(["toy", "--cfg", str(project / "config.yaml")]) == 0
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "Print a word." in capsys.readouterr().out


def test_command_in_a_new_process(project: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pillsnap", "toy", "--cfg", str(project / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(CONFIG.parent)}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "HELLO\n"


def test_reader_in_two_processes(
    project: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tables(tmp_path, tiny_data, 8)
    words = ["--data-root", str(tmp_path), "--out", str(project / "manifest.parquet"), "--workers", "2"]
    assert cli.main(["scan", *words, "data.format=toy"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "toy" and report["buckets"] == 8 and report["notes"] == ["read by SpawnProcess"]
    manifest = pl.read_parquet(project / "manifest.parquet")
    assert set(manifest["source"]) == {"toy"} and set(manifest["photo_kind"]) == {"single", "combination"}


def test_loss_and_augmentation(run: Path) -> None:
    calls = sys.modules["toy_plugin"].CALLS
    assert calls["loss"] > 0 and calls["augmentation"] > 0
    settings = load_settings(run / "config.yaml")
    assert settings.plugins == ("toy_plugin",) and settings.train.classifier.loss == "toy"
    decisions = json.loads((run / "decisions.json").read_text(encoding="utf-8"))
    assert "toy_plugin" in [decision["choice"] for decision in decisions if decision["what"] == "plugins"]


def test_export_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--run", str(run), "--format", "toy"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"]["toy"]["passed"]
    file = run / "export" / "classifier.onnx.gz"
    assert get_model_info(file)["format"] == "toy"
    assert cli.main(["models", "info", str(file)]) == 0


def test_engine(project: Path, models: Path) -> None:
    settings = load_settings(project / "config.yaml", ["serve.engine=toy"])
    with TestClient(create_app(settings, Environment((RIGHT,), model_path=models))) as client:
        assert sys.modules["toy_plugin"].CALLS["engine"] == 2
        response = client.post("/predict", headers=KEY, files={"image": ("photo.jpg", photo_jpeg(), "image/jpeg")})
        assert response.status_code == 200 and response.json()["pills"]


def test_endpoint(project: Path) -> None:
    client = TestClient(create_app(load_settings(project / "config.yaml"), Environment((RIGHT,))))
    assert client.get("/toy").json() == {"toy": True}
    assert "/toy" in client.get("/openapi.json", headers=KEY).json()["paths"]


SMALL = """
from fastapi import APIRouter
from pillsnap.service.endpoints.routers import ROUTERS, Endpoint

router = APIRouter()


@router.get("/small")
def small():
    return {"small": True}


ROUTERS["small"] = Endpoint("production", lambda app: router)
"""
SERVED = """
import sys
from fastapi.testclient import TestClient
from pillsnap.serve import app
assert TestClient(app).get("/small").json() == {"small": True}
assert "torch" not in sys.modules
"""


def test_service_with_a_plugin_imports_no_torch(tmp_path: Path) -> None:
    (write_project(tmp_path, "small_plugin") / "small_plugin.py").write_text(SMALL, encoding="utf-8")
    environment = {**os.environ, "API_KEY": RIGHT, "PYTHONPATH": str(CONFIG.parent)}
    subprocess.run([sys.executable, "-c", SERVED], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, ["there is no such module in"]),
        ("import math\nmath.sine\n", ["importing it fails", "AttributeError", "sine"]),
        ("import no_such_package\n", ["importing it fails", "no_such_package"]),
        ("def\n", ["importing it fails", "SyntaxError"]),
    ],
)
def test_plugin_that_is_missing_or_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: str | None, words: list
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"wrong_plugin_{tmp_path.name}"
    file = write_project(tmp_path, name) / "config.yaml"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    assert cli.main(["config", "--cfg", str(file)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and all(word in errors for word in [str(file), name, *words]), errors
    with pytest.raises(SettingsError, match=name):
        load_settings(file)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.classifier.loss=tpy", "train.classifier.loss is 'tpy', but must be one of cross_entropy, toy"),
        ("train.schedule=cosinus", "train.schedule is 'cosinus', but must be one of cosine, onecycle"),
        ("data.format=toys", "data.format is 'toys', but must be one of auto, {readers}"),
        (
            "train.classifier.augmentation=drawing",
            "train.classifier.augmentation is 'drawing', but must be one of usual, drawings",
        ),
        (
            "train.classifier.class_weights=all",
            "train.classifier.class_weights is 'all', but must be one of none, inverse_frequency, effective_number",
        ),
    ],
)
def test_misspelt_choice(
    project: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    words = ["--data-root", str(tables), "--run-dir", str(tmp_path / "run"), f"paths.cache_root={tmp_path / 'cache'}"]
    assert cli.main(["train", "--profile", "cpu", *words, override]) == 2
    assert capsys.readouterr().err == f"pillsnap: {sentence.format(readers=', '.join(layouts.READERS))}\n"
    assert not list(tmp_path.iterdir()), "nothing is scanned or written"


def test_run_from_elsewhere_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "brought_along.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    text = settings_as_yaml(load_settings(CONFIG)).replace("plugins: []", "plugins: [brought_along]")
    (tmp_path / "run" / "config.yaml").write_text(text)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match="brought_along, but there is no such module"):
        load_settings(tmp_path / "run" / "config.yaml")
    assert "brought_along" in text and not list(tmp_path.rglob("*.ran"))
