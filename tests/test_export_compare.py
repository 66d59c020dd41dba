"""Exported files compute the same output as their network, and a file that does not is rejected."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pillsnap import cli
from pillsnap.answer.classes import ClassMap, Drug
from pillsnap.answer.factory import load_identifier
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.manifest import load_dataset
from pillsnap.evaluation.evaluate import identifier_of, true_photos
from pillsnap.export.comparison import Comparison
from pillsnap.export.formats import FORMATS as ALL_FORMATS
from pillsnap.export.onnx import model_opset
from pillsnap.export.report import export_run
from pillsnap.export.samples import crop_samples
from pillsnap.export.sources import sources_of, weights_hash
from pillsnap.models.classifier import PillNetwork
from pillsnap.registry.model_info import get_model_info
from pillsnap.runtime.images import decode_image
from pillsnap.runtime.session import Network
from pillsnap.training.checkpoint import load_checkpoint, save_checkpoint
from pillsnap.training.run import train
from pillsnap.training.trained import load_trained

FORMATS = dict(ALL_FORMATS)


@pytest.fixture(scope="module")
def exported(trained_run: Path) -> dict[str, Any]:
    return export_run(trained_run, load_settings(trained_run / "config.yaml"), tuple(FORMATS))


@pytest.mark.parametrize("read", ["stages", "frozen_copy"])
def test_an_embedding_of_the_stages_is_exported(read: str, tiny_settings: Callable[..., Settings], tmp_path: Path):
    stages = (f"model.classifier.embedding_from={read}", "train.classifier.embedding_drawings=1")
    once = ("train.only=classifier", "train.evaluations=1", "train.classifier.embedding_weight=0", "train.amp=off")
    run = train(tiny_settings(*stages, *once), tmp_path / "run")
    network = load_trained(run).classifier
    assert network.embedding.in_features != network.logits.in_features and network.embedding.weight.any()
    assert bool(network.frozen_copy) == (read == "frozen_copy")
    report = export_run(run, load_settings(run / "config.yaml"), ("onnx", "pt2", "safetensors", "torchscript-script"))
    for name in ("onnx", "pt2", "safetensors"):
        found = report["formats"][name]["classifier"]
        assert found["failures"] == [] and found["min_cosine"] > 0.9999, name
    scripted = report["formats"]["torchscript-script"]["classifier"]
    assert "can't be translated to TorchScript" in scripted["failures"][0]


def test_every_format_is_within_the_tolerances(exported: dict[str, Any]):
    for name, parts in exported["formats"].items():
        classifier, detector = parts["classifier"], parts["detector"]
        if name == "torchscript-script":
            assert classifier["failures"] == [] and "can't be translated" in detector["failures"][0]
            continue
        if not FORMATS[name].fewer_bits:
            assert parts["passed"], (name, parts)
            assert classifier["mse"] <= 1e-6 and classifier["top1_match"] == 1, name
            assert classifier["min_cosine"] > 0.9999, name
            assert detector["map_difference"] <= 0.01 and detector["min_iou"] >= 0.95, name
        assert (
            detector["boxes"] > 0
            and classifier["images"] > 0
            and classifier["bytes"] > 1000
            and classifier["latency_ms"] > 0
        ), name
    assert (
        exported["formats"]["onnx"]["passed"]
        and len(exported["samples"]["classifier"]) == exported["formats"]["onnx"]["classifier"]["images"]
    )


def test_released_files_are_those_that_passed(exported: dict[str, Any], trained_run: Path):
    for name, parts in exported["formats"].items():
        for task in ("classifier", "detector"):
            for file in FORMATS[name].files(task):
                rejected = trained_run / "export-rejected" / file
                assert (trained_run / "export" / file).exists() == parts["passed"], file
                assert rejected.exists() == (
                    not parts["passed"] and not (name == "torchscript-script" and task == "detector")
                ), file
    assert not (trained_run / "export-before").exists() and not (trained_run / "export-aside").exists()


def test_every_file_carries_its_metadata(exported: dict[str, Any], trained_run: Path):
    for name in FORMATS:
        path = (
            trained_run
            / ("export" if exported["formats"][name]["passed"] else "export-rejected")
            / FORMATS[name].files("classifier")[0]
        )
        info = get_model_info(path)
        assert info["model_type"] == "classifier" and info["file_size_bytes"] > 1000 and info["param_count"] > 10_000, (
            name,
            info,
        )
        assert info["model_config"]["class_map_hash"] == load_dataset(trained_run).class_map.hash, name


def test_files_carry_opset_17_a_dynamic_batch_and_the_rules(exported: dict[str, Any], trained_run: Path):
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
def test_checkpoint_and_files_identify_the_same_drugs(exported: dict[str, Any], trained_run: Path, pipeline: str):
    photos = true_photos(load_dataset(trained_run).manifest)[:6]
    reference, served = identifier_of(load_trained(trained_run)), load_identifier(trained_run / "export")
    for photo in photos:
        image = decode_image(Path(photo.image))
        first, second = reference.identify(image, pipeline), served.identify(image, pipeline)
        assert [pill.code for pill in first.pills] == [pill.code for pill in second.pills]
        assert np.allclose([pill.box for pill in first.pills], [pill.box for pill in second.pills], atol=0.5)


def test_a_file_with_other_predictions_is_not_released(
    exported: dict[str, Any], trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    before = (trained_run / "export" / "classifier.onnx").read_bytes()

    def open_wrong(path: Path):
        model, metadata = FORMATS["onnx"].open(path)
        return (lambda batch: -model(batch)) if path.name == "classifier.onnx" else model, metadata

    monkeypatch.setitem(ALL_FORMATS, "onnx", replace(FORMATS["onnx"], open=open_wrong))
    status = cli.main(["export", "--run", str(trained_run)])
    assert status == 1
    assert "names another drug" in capsys.readouterr().err
    assert (trained_run / "export" / "classifier.onnx").read_bytes() == before, "the released file stays"
    assert not json.loads((trained_run / "export-rejected" / "export_report.json").read_text())["passed"]


def test_a_file_without_embeddings_or_with_others_is_rejected(exported: dict[str, Any], trained_run: Path):
    settings = load_settings(trained_run / "config.yaml")
    trained, dataset = load_trained(trained_run), load_dataset(trained_run)
    source = sources_of(trained, dataset, settings)["classifier"]
    samples = crop_samples(dataset, trained.rules, settings)
    comparison = Comparison(source, samples, trained.rules, settings)
    model, metadata = FORMATS["onnx"].open(trained_run / "export" / "classifier.onnx")
    assert model.outputs(np.zeros((2, 3, source.size, source.size), np.float32))[1].shape == (2, 128)

    def shifted(batch: np.ndarray) -> tuple[np.ndarray, ...]:
        logits, embeddings = model.outputs(batch)
        return logits, np.roll(embeddings, 1, axis=1)

    for name in ("onnx", "onnx-int8"):
        for forward in (lambda batch: model(batch), Network(shifted)):
            (reason,) = comparison.failures(name, comparison.metrics((forward, metadata)))
            assert "embeddings have a" in reason
        assert comparison.failures(name, comparison.metrics((model, metadata))) == []
    assert metadata["weights_sha256"] == source.metadata["weights_sha256"]
    assert source.metadata["weights_sha256"] != weights_hash(PillNetwork("test_efficientnet", 2))


def test_a_full_disk_leaves_the_good_files(
    exported: dict[str, Any], trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    before = (trained_run / "export" / "classifier.onnx").read_bytes()

    def full(source: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(ALL_FORMATS, "onnx", replace(FORMATS["onnx"], write=full))
    assert cli.main(["export", "--run", str(trained_run)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (trained_run / "export" / "classifier.onnx").read_bytes() == before
    assert not (trained_run / "export-rejected").exists()


def test_bad_options_end_with_one_sentence(
    exported: dict[str, Any],
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    content = load_checkpoint(trained_run / "best.pt")
    content["rules"]["class_map"] = ClassMap([Drug("K-999999", "another")]).to_json()
    content["classifier"] = PillNetwork("test_efficientnet", classes=1).state_dict()
    save_checkpoint(content, tmp_path / "other.pt")
    run = ["export", "--run", str(trained_run)]
    for words, message in {
        (*run, "--checkpoint", str(tmp_path / "other.pt")): "was trained for another class map",
        (*run, "--checkpoint", str(trained_run / "last.pt")): "does not hold both networks",
        (*run, "--checkpoint", str(tmp_path / "none.pt")): "There is no checkpoint",
        (*run, "--format", "onnx,tflite"): "There is no format 'tflite'",
        (*run, "--format", "onnx-int8", "export.calibration_images=0"): "no training picture to calibrate",
        ("export",): "there is nothing to export",
    }.items():
        before = (trained_run / "export" / "classifier.onnx").stat().st_size
        assert cli.main(list(words)) in (1, 2), words
        errors = capsys.readouterr().err
        assert message in errors and "Traceback" not in errors, errors
        assert (trained_run / "export" / "classifier.onnx").stat().st_size == before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "executorch" else object())
    assert cli.main([*run, "--format", "executorch"]) == 1
    assert "pip install 'pillsnap[formats]'" in capsys.readouterr().err
