"""A command that fails leaves no folder and no file behind, and says why in one sentence."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from pillsnap import cli
from pillsnap.atomic import write_json
from pillsnap.config.load import save_settings
from pillsnap.config.schema import Settings
from pillsnap.evaluation import gate
from pillsnap.export import report as export_report
from pillsnap.export.onnx import ExportError
from pillsnap.packaging.archive import ArchiveError, make_archive, restore_archive


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the command runs in, with the settings of a project above it."""
    save_settings(Settings(), tmp_path / "config.yaml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def exported(folder: Path) -> Path:
    """A run folder whose export claims to have passed."""
    save_settings(Settings(), folder / "config.yaml")
    write_json(folder / "export" / "export_report.json", {"passed": True, "formats": {}})
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Status and error stream of a command."""
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as error:
        status = int(str(error.code))
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--data-root", "/nowhere/pills", "--run-dir", "runs/first"], "There is no folder /nowhere/pills"),
        (["train", "--data-root", "/nowhere/pills", "paths.run_root=runs"], "There is no folder /nowhere/pills"),
        (["scan", "--data-root", "/nowhere/pills", "--out", "new/manifest.parquet"], "There is no folder"),
        (["cache", "build", "--data-root", "/nowhere/pills", "paths.cache_root=cache"], "There is no folder"),
        (["gate", "--run", "RUN", "--out", "reports", "serve.engine=steam"], "There is no engine 'steam'"),
        (["models", "push", "--run", "RUN", "store.url=store"], "lacks"),
        (["models", "push", "--run", "nowhere", "store.url=store"], "has no export"),
        (["models", "pull", "--out", "served", "store.url=store", "paths.cache_root=cache"], "There is no model store"),
        (["ship", "hub", "--run", "RUN", "--out", "package"], "is not exported as onnx"),
        (["ship", "sagemaker", "--run", "RUN", "--out", "new/model.tar.gz"], "is not exported as onnx"),
        (["archive", "make", "new/release.tar", "--model", "nowhere"], "There is no model folder"),
        (["archive", "restore", "BROKEN", "--into", "srv/pillsnap"], "is no archive of a release"),
        (["archive", "rollback", "--into", "srv/pillsnap"], "There is no release before"),
        (["predict", "nowhere.jpg", "--model", "nowhere", "--out", "new/answers.txt"], ""),
        (["evaluate", "--run", "nowhere"], "there is no run in nowhere"),
        (["export", "--run", "nowhere"], "there is no run in nowhere"),
        (["bench", "--run", "RUN", "--out", "new"], ""),
    ],
)
def test_a_command_that_fails_leaves_nothing(
    words: list[str], sentence: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 100)
    places = {"RUN": str(exported(tmp_path / "run")), "BROKEN": str(tmp_path / "broken.tar")}
    before = sorted(tmp_path.rglob("*"))
    status, error = run(capsys, *(places.get(word, word) for word in words))
    assert status in (1, 2) and sentence in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["models", "cache", "ship", "archive"])
def test_a_command_without_its_verb_is_one_sentence(command: str, project: Path, capsys: pytest.CaptureFixture[str]):
    status, error = run(capsys, command)
    assert status == 2 and error.count("\n") == 1 and not list(project.iterdir())
    verbs = {"models": "list,show,push", "cache": "build,show", "ship": "hub,sagemaker", "archive": "make,check"}
    assert verbs[command] in error and "TASK VERSION" not in error
    status, error = run(capsys, command, "dance")
    assert status == 2 and error.count("\n") == 1 and "dance" in error


def test_an_archive_is_not_overwritten(models: Path, tmp_path: Path):
    make_archive(models, tmp_path / "release.tar", note="first")
    before = (tmp_path / "release.tar").read_bytes()
    with pytest.raises(ArchiveError, match="release.tar exists already and is not overwritten"):
        make_archive(models, tmp_path / "release.tar", note="second")
    assert (tmp_path / "release.tar").read_bytes() == before


def test_a_damaged_archive_leaves_no_folder_and_keeps_the_releases(models: Path, tmp_path: Path):
    whole, damaged = tmp_path / "release.tar", tmp_path / "damaged.tar"
    make_archive(models, whole)
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as archive:
        last = archive.getmembers()[-1]
    data[last.offset_data + last.size // 2] ^= 1
    damaged.write_bytes(bytes(data))
    with pytest.raises(ArchiveError, match="is damaged"):
        restore_archive(damaged, tmp_path / "srv" / "pillsnap")
    assert not (tmp_path / "srv").exists()
    release = restore_archive(whole, tmp_path / "srv" / "pillsnap")
    with pytest.raises(ArchiveError, match="is damaged"):
        restore_archive(damaged, tmp_path / "srv" / "pillsnap")
    assert [path.name for path in release.parent.iterdir()] == [release.name]


def test_an_export_or_a_gate_that_ends_early_leaves_no_folder(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise ExportError("there is nothing to compare")

    monkeypatch.setattr(export_report, "export_formats", fail)
    shutil.rmtree(trained_run / "export-rejected", ignore_errors=True)  # of another file's tests
    with pytest.raises(ExportError, match="nothing to compare"):
        export_report.export_run(trained_run, Settings())
    assert not (trained_run / "export-rejected").exists()
    monkeypatch.setattr(gate, "checks_of", fail)
    with pytest.raises(ExportError, match="nothing to compare"):
        gate.gate_run(exported(tmp_path / "run"), Settings(), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()
