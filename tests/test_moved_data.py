"""Photos that are somewhere else after the training: a new folder is used when it holds the same photos."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from pillsnap.cli import main
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import load_dataset
from pillsnap.data.moved import dataset_of_run, is_same_photo
from pillsnap.data.reading.photo_files import member_reference
from pillsnap.data.reading.records import DataError
from pillsnap.training.run import train

QUICK = ["latency.warmup_runs=0", "latency.runs=1"]


@pytest.fixture(scope="module")
def moved(tiny_data: Path, tiny_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and its dataset, which was called `data` in training and is called `moved` now."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_data, folder / "data")
    train(tiny_settings("train.amp=off", data=folder / "data"), folder / "run")
    (folder / "data").rename(folder / "moved")
    return folder


@pytest.fixture
def run(moved: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(moved / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))


def changed(moved: Path, tmp_path: Path, every: int) -> Path:
    """A copy of the dataset in which some photos are others, with the same names."""
    data = shutil.copytree(moved / "moved", tmp_path / "other")
    for path in sorted(data.rglob("*.png"))[::every]:
        with Image.open(path) as image:
            picture = image.convert("RGB").transpose(Image.Transpose.ROTATE_180)
        picture.save(path)
    return data


def test_the_manifest_has_paths_below_the_dataset(run: Path):
    paths = pl.read_parquet(run / "manifest.parquet")["image"]
    assert not paths.str.starts_with("/").any()


def test_commands_name_the_option_and_take_the_new_place(moved: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("evaluate", "export"):
        status = main([command, "--run", str(run), *QUICK])
        error = capsys.readouterr().err.splitlines()[-1]
        assert status in (1, 2) and "damaged" not in error
        assert (
            f"no longer in {moved / 'data'}" in error and "name the folder where they are now with --data-root" in error
        )
    assert not (run / "evaluation.json").exists() and not (run / "export-rejected").exists()
    for command in ("evaluate", "export"):
        assert main([command, "--run", str(run), "--data-root", str(moved / "moved"), *QUICK]) == 0
    assert json.loads((run / "evaluation.json").read_text())["single"]["images"] > 0
    capsys.readouterr()
    limits = ["goals.top1=0", "goals.map50=0", "goals.latency_ms_p95=60000", "gate.memory_mb=20000"]
    words = ["--out", str(run / "reports"), "gate.reproducibility_images=4", "serve.threads=1", *limits, *QUICK]
    assert main(["gate", "--run", str(run), *words]) == 1, "the photos are not where they were"
    assert main(["gate", "--run", str(run), "--data-root", str(moved / "moved"), *words]) == 0


@pytest.mark.parametrize("every", [1, 7])
def test_other_photos_with_the_same_names_are_refused(moved: Path, run: Path, tmp_path: Path, every: int):
    with pytest.raises(DataError, match="does not hold the photos that the run .* was trained with"):
        dataset_of_run(run, changed(moved, tmp_path, every))


def test_a_missing_photo_is_refused(moved: Path, run: Path, tmp_path: Path):
    data = shutil.copytree(moved / "moved", tmp_path / "other")
    gone = data / pl.read_parquet(run / "manifest.parquet")["image"][0]
    gone.unlink()
    with pytest.raises(DataError, match=f"1 of .* photos are missing there or differ, such as {gone}"):
        dataset_of_run(run, data)
    with pytest.raises(DataError, match="There is no folder"):
        dataset_of_run(run, tmp_path / "nowhere")


def test_a_run_resumes_in_the_new_place_and_remembers_it(
    moved: Path, run: Path, tiny_settings: Callable[..., Settings], tmp_path: Path
):
    with pytest.raises(DataError, match="does not hold the photos"):
        train(tiny_settings("train.amp=off", "train.resume=last", data=changed(moved, tmp_path, 1)), run)
    train(tiny_settings("train.amp=off", "train.resume=last", data=moved / "moved"), run)
    assert load_dataset(run).report["root"] == str(moved / "moved")
    assert dataset_of_run(run).manifest.equals(load_dataset(moved / "run", moved / "moved").manifest)


def test_photos_in_archives_are_compared_by_their_checksum(tmp_path: Path):
    archive = tmp_path / "TS_1_single.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("K-000001/a.png", b"a picture")
    reference = member_reference(str(archive), 0, "K-000001/a.png")
    assert is_same_photo(reference, 9, f"crc32:{zlib.crc32(b'a picture'):08x}")
    assert not is_same_photo(reference, 9, "crc32:00000000")
    assert is_same_photo(reference, 9, "") and not is_same_photo(reference, 8, None)
