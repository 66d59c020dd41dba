"""The colour rule of the pipeline: the same in training and in serving, and refused where it differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image
from tiny_models import RULES, save_classifier, save_detector

from pillsnap.answer.color.balance import COLOR_RULES, NO_CORRECTION, Balance, estimate_balance, estimate_balances
from pillsnap.answer.color.learned import LEARNED, LEARNED_RULE, mixed_colors
from pillsnap.answer.factory import load_identifier
from pillsnap.answer.identify import Identifier
from pillsnap.answer.rules import ModelMismatch, Rules
from pillsnap.config.load import settings_as_yaml
from pillsnap.config.schema import Settings, SettingsError
from pillsnap.data.cache.crop_store import Crops, CropStore
from pillsnap.data.cache.open import open_store
from pillsnap.evaluation import references
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.color.spaces import to_encoded, to_linear
from pillsnap.training.checkpoint import CheckpointError
from pillsnap.training.resume import check_same_settings
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


def identifier_of(rule: str) -> Identifier:
    """It finds one pill in `BOX`."""
    x1, y1, x2, y2 = BOX
    scale = RULES.detector_size / 320
    row = [(x1 + x2) / 2 * scale, ((y1 + y2) / 2 + 40) * scale, (x2 - x1) * scale, (y2 - y1) * scale, 0.9]
    rules = replace(RULES, color=rule, single_scale=1.0)
    return Identifier(lambda batch: batch, lambda batch: np.array(row, np.float32)[None, :, None], rules)


def served(photo: Path, rule: str) -> np.ndarray:
    """The crop that the classifier gets in serving."""
    return identifier_of(rule).cropper.crop_pills(np.asarray(Image.open(photo)), "combo").crops[0]


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


def test_a_cache_never_returns_the_pixels_of_other_numbers(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    crops = Crops([str(photo)], np.array([BOX], np.float64), LEARNED_RULE)
    before = open_store(crops, 64, 0.12, 10**7, "hotset", tmp_path / "cache")[0]
    other = replace(LEARNED, level=-2.0)
    monkeypatch.setattr("pillsnap.data.cache.crop_store.LEARNED", other)
    monkeypatch.setattr(mixed_colors, "__defaults__", (other,))
    assert not np.array_equal(before, CropStore(crops, 64, 0.12, 10**7)[0])
    after = open_store(crops, 64, 0.12, 10**7, "hotset", tmp_path / "cache")[0]
    assert np.array_equal(after, CropStore(crops, 64, 0.12, 10**7)[0])


def test_the_light_is_gone(photo: Path):
    pixels = np.asarray(Image.open(photo))
    for rule in COLOR_RULES:
        corrected = estimate_balance(pixels, rule, [BOX])(pixels)
        paper = corrected[:60].reshape(-1, 3).mean(axis=0)
        assert np.ptp(paper) < 4 and np.ptp(pixels[:60].reshape(-1, 3).mean(axis=0)) > 60
    assert estimate_balance(np.zeros((50, 50, 3), np.uint8), "gray_world") == Balance()


@each_rule
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 500), (500, 2), (30, 2560), (60, 6000)])
def test_a_photo_that_is_hardly_more_than_a_line_is_cropped(rule: str, shape: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert identifier_of(rule).cropper.crop_pills(pixels, "single").crops.any()
    assert min(estimate_balance(pixels, rule).gains) > 0


def test_the_whole_photo_can_be_shown_as_it_was_compared(photo: Path):
    pixels = np.asarray(Image.open(photo))
    assert np.array_equal(identifier_of(NO_CORRECTION).cropper.crop_pills(pixels, "combo").balance(pixels), pixels)
    shown = identifier_of("gray_world").cropper.crop_pills(pixels, "combo").balance(pixels)
    assert np.ptp(shown[:60].reshape(-1, 3).mean(axis=0)) < 4


def test_a_photo_without_surroundings_is_canonical():
    cut_out = np.zeros((90, 90, 3), np.uint8)
    cv2.ellipse(cut_out, (45, 45), (30, 20), 20, 0, 360, (200, 90, 40), -1)
    framed = np.pad(np.full((40, 90, 3), (230, 180, 90), np.uint8), ((25, 25), (0, 0), (0, 0)))
    for image, boxes in ((cut_out, []), (cut_out, [Box(15, 15, 75, 75)]), (framed, [])):
        for rule in COLOR_RULES:
            assert estimate_balance(image, rule, boxes) == Balance()
    assert estimate_balance(framed, "gray_world", [Box(30, 30, 60, 60)]) != Balance(), "the box tells what is around"


def test_the_learned_rule_corrects_each_side_of_a_mixed_light(photo: Path):
    pixels = np.asarray(Image.open(photo))
    side = np.linspace(0, 1, pixels.shape[1])[None, :, None]
    gains = np.array([1.3, 1.0, 0.7]) * (1 - side) + np.array([0.8, 1.0, 1.3]) * side
    mixed = np.rint(255 * to_encoded(np.clip(to_linear(pixels / 255) * gains * 0.6, 0, 1))).astype(np.uint8)
    left, right = Box(20, 80, 80, 140), Box(240, 80, 300, 140)
    balances = estimate_balances(mixed, LEARNED_RULE, [BOX], [left, right])
    colors = [
        np.median(balance(mixed[80:140, int(box.x1) : int(box.x2)]).reshape(-1, 3), axis=0)
        for box, balance in zip((left, right), balances, strict=True)
    ]
    whole = estimate_balance(mixed, LEARNED_RULE, [BOX])(mixed)
    apart = np.abs(np.median(whole[:, :60].reshape(-1, 3), axis=0) - np.median(whole[:, 260:].reshape(-1, 3), axis=0))
    assert np.abs(colors[0] - colors[1]).max() < 0.7 * apart.max()


SECOND = Box(20, 20, 80, 60)
FAR = "too coloured, too dark or too bright to trust the colours"


def notes_of(image: np.ndarray, rule: str, *boxes: Box) -> list[str]:
    found = np.array(boxes, np.float32).reshape(-1, 4), np.ones(len(boxes), np.float32)
    return identifier_of(rule).cropper.crop_pills(image, "combo" if boxes else "single", pills=found).notes


def in_light(gains: tuple[float, ...], ground: tuple[int, ...] = (190, 190, 190)) -> np.ndarray:
    """A red pill and a white one."""
    pixels = np.full((240, 320, 3), ground, np.uint8)
    for (x1, y1, x2, y2), color in ((BOX, (190, 60, 40)), (SECOND, (225, 222, 215))):
        middle, axes = (int(x1 + x2) // 2, int(y1 + y2) // 2), (int(x2 - x1) // 2, int(y2 - y1) // 2)
        cv2.ellipse(pixels, middle, axes, 0, 0, 360, color, -1, cv2.LINE_AA)
    return np.rint(255 * to_encoded(np.clip(to_linear(pixels / 255) * gains, 0, 1))).astype(np.uint8)


@pytest.mark.parametrize(
    "gains, noted",
    [
        ((1.0, 1.0, 1.0), False),
        ((1.18, 1.0, 0.78), False),
        ((0.6, 0.6, 0.6), False),
        ((1.0, 0.35, 0.1), True),
        ((0.03, 0.03, 0.03), True),
        ((0.01, 0.01, 0.01), True),
        ((8.0, 8.0, 8.0), True),
    ],
)
@each_rule
def test_the_answer_says_when_the_light_was_far_from_the_studio(rule: str, gains: tuple[float, ...], noted: bool):
    notes = notes_of(in_light(gains), rule, BOX, SECOND)
    assert any(FAR in note for note in notes) == noted


@each_rule
def test_the_light_of_every_pill_counts(rule: str):
    light, dark = in_light((1.0, 1.0, 1.0)), in_light((0.03, 0.03, 0.03))
    dark[115:], dark[:, 135:] = light[115:], light[:, 135:]  # a shadow on the white pill alone
    (note,) = notes_of(dark, rule, BOX, SECOND)
    assert note.startswith(f"The light on 1 of 2 pills was {FAR}")
    assert not notes_of(dark, rule, BOX)


def test_a_coloured_or_dark_table_is_no_light():
    for ground in ((74, 112, 160), (24, 24, 26), (250, 250, 250)):
        assert not notes_of(in_light((1.0, 1.0, 1.0), ground), NO_CORRECTION, BOX, SECOND)
    assert any(FAR in note for note in notes_of(in_light((0.03, 0.03, 0.03)), NO_CORRECTION)), "whole photo"


@pytest.mark.parametrize("rule", COLOR_RULES)
def test_references_see_the_light_without_the_other_pills(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A reference has the colours that a request gives the same pill of the same photo."""
    Image.fromarray(in_light((1.0, 0.9, 0.6))).save(tmp_path / "two.png")
    corners = [dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)) for box in (SECOND, BOX)]
    known = {"image": str(tmp_path / "two.png"), "side": "front", "group": "g", "split": "train", "class_index": 0}
    rows = [known | {"code": code, "photo_kind": "combination"} | box for code, box in zip("AB", corners, strict=True)]
    made = []
    monkeypatch.setattr(references, "make_reference", lambda identifier, crop, *facts: made.append(crop))
    identifier = identifier_of(rule)
    references.references_of(identifier, references.chosen_rows(pl.DataFrame(rows), 2), 10**6)
    pixels, boxes = in_light((1.0, 0.9, 0.6)), np.array([SECOND, BOX], np.float32)
    asked = identifier.cropper.crop_pills(pixels, "combo", pills=(boxes, np.ones(2, np.float32)))
    assert np.array_equal(np.array(made), asked.crops)


def test_a_classifier_whose_learned_rule_was_trained_anew_is_refused():
    value = replace(RULES, color=LEARNED_RULE).to_json()
    assert Rules.from_json(value).color == LEARNED_RULE and value["color_weights"] == LEARNED.to_json()
    value["color_weights"] = value["color_weights"] | {"level": -3.0}
    with pytest.raises(ModelMismatch, match="learned has other numbers"):
        Rules.from_json(value)


def test_the_middle_pill_of_a_photo_has_a_say_in_the_exposure_of_all():
    """A dark pill that lies alone is taken for one in the shade; between light ones less so."""
    photo = np.full((120, 240, 3), 150, np.uint8)
    boxes = [Box(20.0 + 75 * number, 40, 70 + 75 * number, 80) for number in range(3)]
    for number, level in enumerate((176, 60, 176)):
        photo[40:80, 20 + 75 * number : 70 + 75 * number] = level
    light, dark, _ = estimate_balances(photo, LEARNED_RULE, boxes)
    (alone,) = estimate_balances(photo, LEARNED_RULE, boxes, boxes[1:2])
    assert alone == dark, "it is the middle of all pills, not of those that are corrected"
    photo[:, :90], photo[:, 165:] = 150, 150
    (single,) = estimate_balances(photo, LEARNED_RULE, boxes[1:2])
    assert light.exposure < dark.exposure < single.exposure - 0.2


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
    with pytest.raises(SettingsError, match="identify.color is 'grey_world'.*none, .*shades_of_gray, learned"):
        check_choices(wrong)
    content = {"config": settings_as_yaml(settings)}
    check_same_settings(content, tmp_path / "last.pt", settings)
    with pytest.raises(CheckpointError, match="identify.color was learned, now gray_world"):
        check_same_settings(content, tmp_path / "last.pt", other)
