"""The exported files answer like the networks they were made from, and a file that does not is refused."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from pillsnap import cli
from pillsnap.config import load_settings
from pillsnap.data.manifest import load_dataset
from pillsnap.evaluation import identifier_of, true_photos
from pillsnap.export import report as export_report
from pillsnap.export.onnx import model_opset
from pillsnap.export.report import export_run
from pillsnap.runtime.identify import load_identifier
from pillsnap.runtime.images import decode_image
from pillsnap.training.checkpoint import load_trained


@pytest.fixture(scope="module")
def exported(trained_run: Path) -> dict:
    return export_run(trained_run, load_settings(trained_run / "config.yaml"))


def test_tolerances_are_kept(exported: dict):
    assert exported["passed"], exported["failures"]
    assert exported["classifier"]["mse"] <= 1e-6 and exported["classifier"]["top1_match"] == 1
    assert exported["detector"]["map_difference"] <= 0.01 and exported["detector"]["min_iou"] >= 0.95
    assert exported["detector"]["boxes"] > 0 and exported["classifier"]["images"] > 0


def test_files_carry_opset_17_a_dynamic_batch_and_the_rules(exported: dict, trained_run: Path):
    rules = load_trained(trained_run).rules
    for task, size in (("classifier", rules.classifier_size), ("detector", rules.detector_size)):
        model = onnx.load(trained_run / "export" / f"{task}.onnx")
        assert model_opset(model) == 17
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        metadata = json.loads({item.key: item.value for item in model.metadata_props}["pillsnap"])
        assert metadata["task"] == task and metadata["opset"] == 17
        assert metadata["rules"]["class_map"]["hash"] == rules.class_map.hash
        assert metadata["rules"]["margin"] == rules.margin and metadata["rules"]["mean"] == list(rules.mean)
        assert metadata["rules"][f"{task}_size"] == size


@pytest.mark.parametrize("pipeline", ["single", "combo"])
def test_checkpoint_and_files_name_the_same_drugs(exported: dict, trained_run: Path, pipeline: str):
    photos = true_photos(load_dataset(trained_run).manifest)[:6]
    reference, served = identifier_of(load_trained(trained_run)), load_identifier(trained_run / "export")
    for photo in photos:
        image = decode_image(Path(photo.image))
        first, second = reference.identify(image, pipeline), served.identify(image, pipeline)
        assert [pill.code for pill in first.pills] == [pill.code for pill in second.pills]
        assert np.allclose([pill.box for pill in first.pills], [pill.box for pill in second.pills], atol=0.5)


def test_a_file_that_answers_differently_is_not_released(exported: dict, trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    before = (trained_run / "export" / "classifier.onnx").read_bytes()
    real_open = export_report.open_model

    def open_wrong(path: Path):
        model = real_open(path)
        return (lambda batch: -model(batch)) if path.name == "classifier.onnx" else model

    monkeypatch.setattr(export_report, "open_model", open_wrong)
    status = cli.main(["export", "--run", str(trained_run)])
    assert status == 1
    assert "names another drug" in capsys.readouterr().err
    assert (trained_run / "export" / "classifier.onnx").read_bytes() == before, "the released file stays"
    assert not json.loads((trained_run / "export-rejected" / "export_report.json").read_text())["passed"]
