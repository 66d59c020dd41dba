"""A quality model goes wherever the models go that it lies beside: store, archive, endpoint."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from tiny_models import photo_jpeg, save_classifier, save_detector, save_quality

from pillsnap.answer.quality.judge import load_judge
from pillsnap.atomic import sha256
from pillsnap.cli import main
from pillsnap.packaging.archive import ArchiveError, check_archive, make_archive, restore_archive
from pillsnap.packaging.sagemaker import build_archive
from pillsnap.packaging.sagemaker_handler import input_fn, model_fn, output_fn, predict_fn
from pillsnap.packaging.shipped import exported_files
from pillsnap.runtime.session import ModelError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An exported run with a quality model beside its networks."""
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    for save in (save_classifier, save_detector, save_quality):
        save(export)
    (export / "export_report.json").write_text(json.dumps({"passed": True, "formats": {"onnx": {"passed": True}}}))
    for name in ("best_classifier.pt", "best_detector.pt", "config.yaml"):
        (export.parent / name).write_text("{}")
    return export.parent


def test_the_store_has_it_as_a_task_of_its_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quality, served = run / "export" / "quality.onnx", tmp_path / "served"
    place = [f"store.url={tmp_path / 'store'}", f"paths.cache_root={tmp_path / 'cache'}"]
    assert main(["models", "push", "--run", str(run), *place]) == 0, capsys.readouterr().err
    assert "quality v1" in capsys.readouterr().out
    for task in ("classifier", "detector"):
        assert main(["models", "promote", task, "1", *place]) == 0
    assert main(["models", "pull", "--out", str(served), *place]) == 0
    assert not (served / "quality.onnx").exists(), "no version of it is promoted"
    assert main(["models", "promote", "quality", "1", *place]) == 0
    assert main(["models", "pull", "--out", str(served), *place]) == 0
    assert (served / "quality.onnx").read_bytes() == quality.read_bytes()
    capsys.readouterr()
    assert main(["models", "show", "quality", "1", *place]) == 0
    assert sha256(quality) in capsys.readouterr().out
    quality.write_text("no model")
    assert main(["models", "push", "quality", "--run", str(run), *place]) == 0
    assert main(["models", "pull", "quality", "2", "--out", str(served), *place]) == 2
    assert load_judge(served / "quality.onnx").name == "tiny quality", "what can't be opened replaces nothing"
    quality.unlink()
    assert main(["models", "push", "quality", "--run", str(run), *place]) == 2
    assert "lacks" in capsys.readouterr().err


def test_a_release_archive_holds_it_with_its_hash(run: Path, tmp_path: Path):
    quality = run / "export" / "quality.onnx"
    manifest = make_archive(run / "export", tmp_path / "release.tar")
    assert manifest["files"]["models/quality.onnx"] == {"sha256": sha256(quality), "bytes": quality.stat().st_size}
    release = restore_archive(tmp_path / "release.tar", tmp_path / "server")
    assert load_judge(release / "models" / "quality.onnx").name == "tiny quality"
    data = bytearray((tmp_path / "release.tar").read_bytes())
    data[data.index(quality.read_bytes()) + 100] ^= 1
    (tmp_path / "changed.tar").write_bytes(data)
    with pytest.raises(ArchiveError, match="models/quality.onnx in .* is damaged"):
        check_archive(tmp_path / "changed.tar")
    quality.write_text("no model")
    with pytest.raises(ModelError, match="quality.onnx"):
        make_archive(run / "export", tmp_path / "another.tar")
    assert not (tmp_path / "another.tar").exists()


def test_an_endpoint_judges_photos_with_it(run: Path, tmp_path: Path):
    assert [path.name for path in exported_files(run, ["onnx"])] == [
        "classifier.onnx",
        "detector.onnx",
        "quality.onnx",
    ]
    assert "quality.onnx" in build_archive(run, tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        archive.extractall(tmp_path / "model", filter="data")
    models = model_fn(str(tmp_path / "model"))
    bright, dark = (
        json.loads(output_fn(predict_fn(input_fn(photo_jpeg(light), "image/jpeg"), models), "*/*")[0])["quality"]
        for light in (1.0, 0.2)
    )
    assert bright["good_enough"] and not dark["good_enough"]
    assert [reason["reason"] for reason in dark["reasons"]] == ["too_dark"]
