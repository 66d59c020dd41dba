"""`make bench-gallery` in small: its goals, what they count and what they are measured on."""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_models
from conftest import goal_values
from tiny_models import COLOURS, DRUGS, save_classifier, save_detector

from pillsnap.answer.classes import ClassMap
from pillsnap.answer.factory import load_identifier
from pillsnap.answer.identify import Identifier
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.bench.gallery import main as bench
from pillsnap.bench.gallery import speed, studio
from pillsnap.bench.gallery.draws import resampled, unknowns
from pillsnap.bench.gallery.sets import embed_set
from pillsnap.color.data.pills import PillPhoto
from pillsnap.runtime.boxes import Box

NAMES = ("K-000007", "K-000030", "K-000101")
SHADES = dict(zip(NAMES, (255 * COLOURS).astype(np.uint8).tolist()))


def pill(shade: list[int], ground: int, rng: np.random.Generator) -> np.ndarray:
    """BGR, one pill in the middle."""
    photo = np.full((120, 160, 3), ground, np.uint8)
    cv2.ellipse(photo, (80, 60), (40, 30), float(rng.integers(180)), 0, 360, shade[::-1], -1, cv2.LINE_AA)
    return photo


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pills in the layout of YOLO, studio photos in a ZIP, phone photos, and a product with tiny models."""
    root, rng = tmp_path / "tray", np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number, (name, shade) in enumerate(SHADES.items()):
            for copy in range(count):
                stem = f"{name}-{split}-{copy}"
                cv2.imwrite(str(root / "images" / split / f"{stem}.png"), pill(shade, int(rng.integers(30, 60)), rng))
                (root / "labels" / split / f"{stem}.txt").write_text(f"{number} 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(NAMES)}]\n")
    with zipfile.ZipFile(tmp_path / "studio.zip", "w") as archive:
        for name, shade in SHADES.items():
            (tmp_path / "phone" / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "phone" / name / "1_front.png"), pill(shade, 180, rng)[20:100, 30:130])
            for side in ("front", "back"):
                cv2.imwrite(str(tmp_path / "side.png"), pill(shade, 0, rng))
                archive.write(tmp_path / "side.png", f"{name}/{side}.png")
    (tmp_path / "run" / "export").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def product(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run that identifies everything."""
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=Verdicts(identified=-1e9)))
    save_classifier(data / "run" / "export", embeddings=True)
    save_detector(data / "run" / "export")
    (data / "run" / "config.yaml").write_text("stage: 1\n")
    return data / "run"


def test_everything_in_small(
    data: Path, product: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def partial(run: Path, left_out: list[str], *others: object) -> Identifier:
        identifier = load_identifier(run / "export")
        known = [replace(drug, code=f"Z-{drug.code}" if drug.code in left_out else drug.code) for drug in DRUGS]
        identifier.rules = replace(identifier.rules, class_map=ClassMap(known))
        return identifier

    def photos(run: Path, split: str = "unseen") -> list[PillPhoto]:
        found = sorted((data / "tray" / "images" / "val").glob("*.png"))
        return [PillPhoto(path, path.stem, (Box(40, 30, 120, 90),), ("K-999999",)) for path in found]

    monkeypatch.setattr(bench, "general_network", lambda *_: load_identifier(product / "export", detect=False))
    monkeypatch.setattr(bench, "product_run", lambda *_: product)
    monkeypatch.setattr(bench, "partial_network", partial)
    monkeypatch.setattr(bench, "pill_photos", photos)
    monkeypatch.setattr(bench, "served_over_limit", lambda *_: {"name": "p95", "value": 1.0, "at_most": 1.15, "n": 1})
    monkeypatch.setattr(bench, "large_photo", lambda *_: tiny_models.photo_jpeg())
    monkeypatch.setattr(bench, "enroll_seconds", lambda *_: [0.1, 0.2])
    monkeypatch.setattr(bench, "LEFT_OUT", {"drug1": 1, "pushin": 1})
    given = ["--studio", str(data / "studio.zip"), "--phone", str(data / "phone"), "--out", str(data / "out")]
    given += [word for name in ("drug1", "pushin") for word in ("--data", f"{name}={data / 'tray'}")]
    assert bench.main([*given, "--draws", "2", "--lit", "3", "--embeddings", "100", "--trainings", "2"]) == 0
    report = json.loads((data / "out" / "gallery.json").read_text())
    found = goal_values(report)
    sets = [f"{name}_{what}" for name in ("drug1", "pushin") for what in ("5shot", "1shot")]
    sets += [f"{name}_unknown_{what}" for name in ("drug1", "pushin") for what in ("auroc", "fpr95")]
    sets += [f"{name}_{what}" for name in ("drug1", "pushin") for what in ("coverage", "end_to_end")]
    assert set(found) == {
        *sets,
        *("identified_wrong", "calibration_error", "sample_untrained_identified", "untrained_identified"),
        *("lit_one_side", "lit_both_sides", "phone_top1", "phone_top5", "phone_coverage"),
        *("enroll_seconds", "search_ms", "single_p95_over_limit"),
    }
    assert None not in found.values()
    assert found["sample_untrained_identified"] == found["untrained_identified"] == 1, "this product is always sure"
    assert report["values"]["studio"]["phones"].keys() >= {
        "answered",
        "wrong",
        "coverage",
        "with_imprints",
        "with_others",
    }
    (kept,) = (data / "out" / "gallery").glob("readings-*.json")
    assert len(json.loads(kept.read_text())) == 6, "both sides of all"
    assert set(report["values"]["studio"]["ratios"]) >= {"exact", "never"}
    assert "enroll seconds" in capsys.readouterr().out


def test_coverage_counts_only_with_few_wrong_answers(
    data: Path, product: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identifier = load_identifier(product / "export", detect=False)
    options = Namespace(studio=data / "studio.zip", phone=data / "phone", lit=1, draws=2)
    work = data / "work"
    work.mkdir()
    for wrong, expected in ((0.04, 0.6), (0.06, 0.0)):
        monkeypatch.setattr(studio, "coverage_at", lambda *_, found=wrong: (0.6, found))
        goals, values = bench.measure_studio(identifier, options, work)
        assert {goal["name"]: goal["value"] for goal in goals}["phone_coverage"] == expected
        assert (values["phones"]["answered"], values["phones"]["wrong"]) == (0.6, wrong)


def test_an_enrolment_is_timed_with_its_detection(data: Path, product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier, calls = load_identifier(product / "export"), []
    detect = identifier.detect
    assert detect is not None

    def one(batch: np.ndarray) -> np.ndarray:
        calls.append(batch.shape)
        found = detect(batch)
        found[:, 4, 1:] = 0  # the tiny detector always sees two pills
        return found

    monkeypatch.setattr(identifier, "detect", one)
    photo = speed.large_photo(identifier, [np.full((300, 400, 3), 200, np.uint8)])
    assert cv2.imdecode(np.frombuffer(photo, np.uint8), 1).shape == (3000, 4000, 3)
    calls.clear()
    times = speed.enroll_seconds(identifier, photo, data, repeats=2)
    assert len(times) == 2 == len(calls) and min(times) > 0 and (data / "enrolled.npz").is_file()


def test_intervals_are_of_photos_and_not_of_draws(data: Path, product: Path) -> None:
    pills = embed_set(load_identifier(product / "export", detect=False), data / "tray", data)
    noisy = replace(pills, asked=pills.asked + np.random.default_rng(0).normal(0, 0.3, pills.asked.shape))
    area, passed = unknowns(noisy, count=5, draws=4)
    for measured in (area, passed):
        low, high = measured.interval
        assert 0 <= low <= measured.mean <= high <= 1
    scores, new = np.arange(40) % 7 / 7, np.arange(40) % 3 == 0
    sources = np.arange(40).astype(str)
    (low, high), _ = resampled([(scores, new, sources)] * 8)
    assert high - low > 0.1, "equal draws agree, and yet the photos are few"
    (closer, further), _ = resampled([(np.tile(scores, 16), np.tile(new, 16), np.arange(640).astype(str))] * 2)
    assert further - closer < (high - low) / 2, "sixteen times the photos, a quarter of the interval"
