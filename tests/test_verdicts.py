"""Verdicts from end to end: a run is calibrated, its export carries the thresholds, and answers follow them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
import tiny_models
from tiny_models import save_classifier

from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.answer.gallery.gallery_file import GALLERY_FILE, read_gallery
from pillsnap.answer.gallery.recognise import open_identifier
from pillsnap.answer.gallery.references import Gallery, Reference
from pillsnap.answer.gallery.search import Search
from pillsnap.answer.identify import Identifier
from pillsnap.answer.rules import ModelMismatch, Rules
from pillsnap.answer.verdicts.verdicts import VERDICTS, Verdicts
from pillsnap.atomic import sha256
from pillsnap.data.moved import dataset_of_run
from pillsnap.data.reading.photo_files import decode_photo
from pillsnap.evaluation.calibrate import ask
from pillsnap.training.checkpoint import CheckpointError
from pillsnap.training.trained import CALIBRATION_FILE, load_trained


def photo_of(run: Path) -> np.ndarray:
    """A training photo of a run, decoded."""
    manifest = dataset_of_run(run).manifest
    image = manifest.filter(split="train", photo_kind="single")["image"][0]
    return decode_photo(image).pixels


def test_a_calibrated_run_exports_its_thresholds(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    assert load_trained(run).rules.verdicts == Verdicts(), "nothing was chosen yet"
    words = ["calibrate", "--run", str(run), "--folds", "1", "identify.risk=0.5", "identify.missed=0.2"]
    asked: list[bool] = []
    outputs = Identifier._outputs

    def noted(self: Identifier, crops: np.ndarray, turned: bool, embeddings: bool) -> tuple[np.ndarray, np.ndarray]:
        asked.append(turned)
        return outputs(self, crops, turned, embeddings)

    monkeypatch.setattr(Identifier, "_outputs", noted)
    assert cli.main([*words, "identify.turned=false"]) == 0 and False in asked
    assert not load_trained(run).rules.verdicts.turned
    capsys.readouterr()
    once = asked.count(True)  # of the references
    asked.clear()
    assert cli.main(words) == 0
    monkeypatch.undo()
    assert asked.count(True) > once, "the questions too"
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((run / CALIBRATION_FILE).read_text(encoding="utf-8"))
    assert printed["verdicts"] == report["verdicts"] and 0 <= printed["figures"]["unknown_auroc"] <= 1
    chosen = report["verdicts"]["chosen_on"]
    assert len(report["answers"]["score"]) == chosen["known_photos"] + chosen["unknown_photos"]
    assert not all(report["answers"]["known"]), "a drug was left out"
    assert report["left_out"] == 0 and report["decisions"][0]["what"] == "calibration fold 0"
    assert load_trained(run).rules.verdicts == Verdicts.from_json(report["verdicts"])
    assert report["verdicts"]["turned"], "as the setting says"
    report["verdicts"] |= {"similar": 0.9, "familiar": 0.5}  # as where similarity tells more than the logits
    (run / CALIBRATION_FILE).write_text(json.dumps(report), encoding="utf-8")
    assert cli.main(["export", "--run", str(run)]) == 0
    assert load_identifier(run / "export").rules.verdicts == Verdicts.from_json(report["verdicts"])
    gallery = read_gallery(run / "export" / GALLERY_FILE)
    assert set(gallery.drugs) == set(load_trained(run).rules.class_map.codes), "the trained drugs are the references"
    shown = open_identifier(run / "export").identify(photo_of(run), "single").pills[0]
    assert shown.matches and shown.candidates[0].picture and shown.verdict in VERDICTS
    assert cli.main(["calibrate", "--run", str(run), "train.classifier.lr=0.1"]) == 2
    assert "trains as its run was trained" in capsys.readouterr().err
    (run / CALIBRATION_FILE).write_text(json.dumps(report | {"weights_sha256": "0" * 64}), encoding="utf-8")
    assert load_trained(run).rules.verdicts == Verdicts(), "thresholds of other weights don't count"
    (run / CALIBRATION_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="calibrate the run again"):
        load_trained(run)


def test_a_calibration_counts_photos_that_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_classifier(tmp_path, embeddings=True)
    cv2.imwrite(str(tmp_path / "good.png"), np.full((80, 80, 3), (0, 200, 0), np.uint8))
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    identifier = load_identifier(tmp_path, detect=False)
    code = identifier.rules.class_map[0].code
    reference = Reference((code,), "", identifier.embed(np.zeros((1, 64, 64, 3), np.uint8))[0], b"", "a")
    search = Search(Gallery("network", {code: identifier.rules.class_map[0]}, (reference,)))
    photos = [str(tmp_path / name) for name in ("damaged.png", "good.png")]
    corners = {name: [value, value] for name, value in {"x1": 10.0, "y1": 10.0, "x2": 70.0, "y2": 70.0}.items()}
    pills = pl.DataFrame({"image": photos, "code": [code, code], "group": ["a", "b"], **corners})
    with caplog.at_level("INFO", "pillsnap"):
        asked = ask(identifier, search, pills, max_pixels=10**8)
    assert (len(asked.labels), asked.labels[0], asked.left_out) == (1, 0, 1)
    assert "damaged.png" in caplog.text and "1 of 2 photos left out" in caplog.text


@pytest.mark.parametrize("decides", ["logits", "similarity"])
def test_evaluation_measures_verdicts_on_held_out_and_unseen_photos(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, decides: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    manifest = pl.read_parquet(run / "manifest.parquet")
    training = manifest.filter(split="train", photo_kind="single")
    unseen = training.with_columns(
        split=pl.lit("unseen"), class_index=pl.lit(-1, training["class_index"].dtype), code=pl.lit("K-999999")
    ).head(3)
    pl.concat([manifest, unseen]).write_parquet(run / "manifest.parquet")
    thresholds = {"similar": -1.0, "familiar": -1.0} if decides == "similarity" else {"identified": -1e9}
    verdicts = Verdicts(chosen_on={"risk": 0.01}, **thresholds)
    calibration = {"weights_sha256": sha256(run / "best_classifier.pt"), "verdicts": verdicts.to_json()}
    (run / CALIBRATION_FILE).write_text(json.dumps(calibration), encoding="utf-8")
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["verdicts"]
    assert f'"decides": "{decides}"' in capsys.readouterr().out
    held_out = manifest.filter(split="test", photo_kind="single").height
    assert (found["decides"], found["known_photos"], found["unseen_photos"]) == (decides, held_out, 3)
    assert 0 <= found["unknown_auroc"] <= 1 and 0 <= found["unknown_fpr95"] <= 1 and found["top1"] is not None
    if decides == "logits":  # nothing is below such a threshold: whatever is detected is identified
        assert found["identified_wrong"] <= found["coverage"] == 1 - found["called_unknown"]
        (run / CALIBRATION_FILE).unlink()
        assert cli.main(["evaluate", "--run", str(run)]) == 0
        report = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        assert "verdicts" not in report, "a run that was not calibrated identifies nothing"


def test_thresholds_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = np.full((80, 80, 3), (238, 234, 224), np.uint8)
    photo[0, 0] = (0, 200, 0)  # not grey
    for verdicts, expected in {
        Verdicts(identified=-1e6): "identified",
        Verdicts(identified=1e6): "ambiguous",
        Verdicts(identified=1e6, known=1e6): "unknown",
        Verdicts(): "ambiguous",
    }.items():
        monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=verdicts))
        save_classifier(tmp_path)
        pill = load_identifier(tmp_path).identify(photo, "single").pills[0]
        assert pill.verdict == expected in VERDICTS and pill.identified is (expected == "identified")


def test_rules_without_verdicts_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    rules = load_identifier(tmp_path).rules.to_json()
    del rules["verdicts"]
    with pytest.raises(ModelMismatch, match="export it again"):
        Rules.from_json(rules)
