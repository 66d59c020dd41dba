"""The colour rule of the pipeline: the same in training and in serving, and refused where it differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny_models import RULES, save_classifier, save_detector

from pillsnap.answer.color.balance import COLOR_RULES, NO_CORRECTION, Balance, estimate_balance
from pillsnap.answer.factory import load_identifier
from pillsnap.answer.identify import Identifier
from pillsnap.answer.rules import ModelMismatch
from pillsnap.config.load import settings_as_yaml
from pillsnap.config.schema import Settings, SettingsError
from pillsnap.data.cache.crop_store import Crops, CropStore
from pillsnap.data.cache.open import open_store
from pillsnap.runtime.boxes import Box
from pillsnap.training.checkpoint import CheckpointError, check_same_settings
from pillsnap.training.run import check_choices

BOX = Box(120, 80, 220, 160)
each_rule = pytest.mark.parametrize("rule", [NO_CORRECTION, *COLOR_RULES])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A red pill on paper, under a warm lamp."""
    pixels = np.full((240, 320, 3), (220, 200, 150), np.uint8)
    pixels = np.clip(pixels + np.random.default_rng(0).normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    cv2.ellipse(pixels, (170, 120), (50, 40), 0, 0, 360, (190, 60, 40), -1, cv2.LINE_AA)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def served(photo: Path, rule: str) -> np.ndarray:
    """The crop that the classifier gets in serving."""
    x1, y1, x2, y2 = BOX
    scale = RULES.detector_size / 320
    row = [(x1 + x2) / 2 * scale, ((y1 + y2) / 2 + 40) * scale, (x2 - x1) * scale, (y2 - y1) * scale, 0.9]
    rules = replace(RULES, color=rule, single_scale=1.0)
    identifier = Identifier(lambda batch: batch, lambda batch: np.array(row, np.float32)[None, :, None], rules)
    return identifier.crop_pills(np.asarray(Image.open(photo)), "combo").crops[0]


@each_rule
def test_training_and_serving_see_the_same_pixels(rule: str, photo: Path):
    crops = Crops([str(photo)], np.array([BOX], np.float64), rule)
    store = CropStore(crops, RULES.classifier_size, RULES.margin, 10**7)
    assert np.abs(store[0].astype(int) - served(photo, rule)).max() <= 1


@each_rule
@pytest.mark.parametrize("cache", ["hotset", "lmdb"])
def test_a_cache_never_returns_the_pixels_of_another_rule(rule: str, cache: str, photo: Path, tmp_path: Path):
    for color in (NO_CORRECTION, rule, NO_CORRECTION):
        crops = Crops([str(photo)], np.array([BOX], np.float64), color)
        store = open_store(crops, 64, 0.12, 10**7, cache, tmp_path / "cache")
        assert np.array_equal(store[0], CropStore(crops, 64, 0.12, 10**7)[0])


def test_the_light_is_gone(photo: Path):
    pixels = np.asarray(Image.open(photo))
    for rule in COLOR_RULES:
        corrected = estimate_balance(pixels, rule, [BOX])(pixels)
        paper = corrected[:60].reshape(-1, 3).mean(axis=0)
        assert np.ptp(paper) < 4 and np.ptp(pixels[:60].reshape(-1, 3).mean(axis=0)) > 60
    assert estimate_balance(np.zeros((50, 50, 3), np.uint8), "gray_world") == Balance()


def test_files_with_other_rules_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_detector(tmp_path)
    monkeypatch.setattr("tiny_models.RULES", replace(RULES, color="gray_world"))
    save_classifier(tmp_path)
    with pytest.raises(ModelMismatch, match="color"):
        load_identifier(tmp_path)


def test_the_rule_can_neither_be_misspelt_nor_changed_by_a_resumed_run(tmp_path: Path):
    settings = Settings()
    other = settings.model_copy(update={"identify": settings.identify.model_copy(update={"color": "gray_world"})})
    wrong = settings.model_copy(update={"identify": settings.identify.model_copy(update={"color": "grey_world"})})
    check_choices(other)
    with pytest.raises(SettingsError, match="identify.color is 'grey_world'.*none, gray_world, shades_of_gray"):
        check_choices(wrong)
    content = {"config": settings_as_yaml(settings)}
    check_same_settings(content, tmp_path / "last.pt", settings)
    with pytest.raises(CheckpointError, match="identify.color was none, now gray_world"):
        check_same_settings(content, tmp_path / "last.pt", other)
