"""The rule for the background: the same in training and in serving, and refused where it differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import FOUND, RULES, photo_jpeg, save_classifier, save_detector, save_segmenter

from pillsnap.answer.factory import load_identifier
from pillsnap.answer.identify import Identifier
from pillsnap.answer.outlines import Background
from pillsnap.answer.rules import ModelMismatch, Rules
from pillsnap.answer.shapes.background import KEEP, REMOVE
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings, SettingsError
from pillsnap.data.cache.crop_store import Crops, CropStore
from pillsnap.data.cache.open import open_store
from pillsnap.data.samples import background_of
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.export.report import export_run
from pillsnap.packaging.archive import release_files
from pillsnap.packaging.shipped import exported_files
from pillsnap.runtime.images import decode_image
from pillsnap.runtime.letterbox import GREY
from pillsnap.runtime.session import ModelError
from pillsnap.training.checkpoint import CheckpointError
from pillsnap.training.run import check_choices, train
from pillsnap.training.trained import keep_segmenter, load_trained

BOXES = np.array([[134, 114, 306, 286], [350, 266, 562, 390]], np.float64)  # that the detector finds


@pytest.fixture
def background(tmp_path: Path) -> Background:
    save_segmenter(tmp_path)
    return Background.of(tmp_path / "segmenter.onnx")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A white and a red pill on a brown table."""
    Image.fromarray(decode_image(photo_jpeg())).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def removing(background: Background) -> Rules:
    return replace(RULES, background=REMOVE, segmenter=background.hash)


def served(photo: Path, background: Background, color: str) -> np.ndarray:
    """The crops that the classifier gets in serving."""
    rules = replace(removing(background), color=color)
    found = FOUND[:2].T[None]
    identifier = Identifier(lambda batch: batch, lambda batch: found, rules, background.outline)
    return identifier.cropper.crop_pills(decode_image(photo), "combo").crops


@pytest.mark.parametrize("color", ["none", "gray_world"])
def test_training_and_serving_see_the_same_pixels(background: Background, photo: Path, color: str) -> None:
    crops = Crops([str(photo)] * 2, BOXES, color, background)
    store = CropStore(crops, RULES.classifier_size, RULES.margin, 10**7)
    cut = served(photo, background, color)
    for number in range(2):
        assert np.abs(store[number].astype(int) - cut[number]).max() <= 1
        assert (store[number][:4, :4] == GREY).all() and store[number][32, 32].max() > 150, "a pill on grey"


@pytest.mark.parametrize("cache", ["hotset", "lmdb"])
def test_a_cache_never_returns_the_pixels_of_another_rule(
    background: Background, photo: Path, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "other").mkdir()
    save_segmenter(tmp_path / "other", level=0.48)  # the table too, as far as the box goes
    other = Background.of(tmp_path / "other" / "segmenter.onnx")
    seen = []
    for cut in (None, background, other, None):
        crops = Crops([str(photo)] * 2, BOXES, background=cut)
        store = open_store(crops, 64, 0.12, 10**7, cache, tmp_path / "cache")
        seen.append(store[1].copy())
        assert np.array_equal(store[1], CropStore(crops, 64, 0.12, 10**7)[1])
    assert np.array_equal(seen[0], seen[3]) and len({pixels.tobytes() for pixels in seen}) == 3


def test_a_box_without_an_outline_keeps_its_background(background: Background, photo: Path) -> None:
    table = np.array([[20.0, 300.0, 120.0, 400.0]])
    kept, cut = (
        CropStore(Crops([str(photo)], table, background=rule), 64, 0.12, 10**7)[0] for rule in (None, background)
    )
    assert np.array_equal(kept, cut)


def test_files_with_another_segmenter_are_refused(
    background: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr("tiny_models.RULES", removing(background))
    save_classifier(folder), save_detector(folder)
    with pytest.raises(ModelMismatch, match="segmenter.onnx beside it"):
        load_identifier(folder)
    save_segmenter(folder, level=0.5)
    with pytest.raises(ModelMismatch, match=f"its hash begins with {background.hash[:12]}"):
        load_identifier(folder)
    shutil.copy(background.file, folder)
    crops = load_identifier(folder).cropper.crop_pills(decode_image(photo_jpeg()), "combo")
    assert len(crops.masks) == 2 and (crops.crops[0][:4, :4] == GREY).all()


@pytest.mark.parametrize("change", [{"background": "blur"}, {"segmenter": ""}, {"background": KEEP}])
def test_rules_that_do_not_fit_together_are_refused(background: Background, change: dict[str, str]) -> None:
    value = removing(background).to_json()
    assert Rules.from_json(value).segmenter == background.hash
    with pytest.raises(ModelMismatch, match="background"):
        Rules.from_json(value | change)


def test_removing_needs_a_segmenter(background: Background) -> None:
    for more, why in (
        ([], "name a segmenter.onnx with identify.segmenter"),
        ([f"identify.segmenter={background.file}", "train.segmenter.interleaved=true"], "that is trained already"),
    ):
        with pytest.raises(SettingsError, match=why):
            check_choices(load_settings(profile="cpu", overrides=["identify.background=remove", *more]))
    alone = load_settings(profile="cpu", overrides=["identify.background=remove", "train.only=segmenter"])
    assert background_of(alone) is None, "it has no crops that are compared"
    with pytest.raises(ModelError, match="There is no segmenter"):
        Background.of(background.file.with_name("other.onnx"))


def test_a_run_keeps_its_segmenter(
    background: Background, tiny_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = tiny_settings("identify.background=remove", f"identify.segmenter={background.file}")
    folder = train(settings, tmp_path / "run")
    trained = load_trained(folder)
    assert trained.rules.segmenter == background.hash and trained.background.file == folder / "segmenter.onnx"
    assert evaluate_run(folder, settings)["single"]["images"] > 0
    report = export_run(folder, settings)
    assert report["passed"], report["failures"]
    made = Path(report["folder"])
    assert load_identifier(made).rules.background == REMOVE
    assert json.dumps(report) and (made / "segmenter.onnx").read_bytes() == background.file.read_bytes()
    assert {"classifier.onnx", "segmenter.onnx"} <= {path.name for path in exported_files(folder, ["onnx"])}
    assert "models/segmenter.onnx" in release_files(made, None), "a release can't be served without it"
    (tmp_path / "other").mkdir()
    save_segmenter(tmp_path / "other", level=0.5)
    with pytest.raises(CheckpointError, match="another segmenter"):
        keep_segmenter(Background.of(tmp_path / "other" / "segmenter.onnx"), folder)
    (folder / "segmenter.onnx").unlink()
    with pytest.raises(CheckpointError, match="is missing or another one"):
        load_trained(folder)
