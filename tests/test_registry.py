"""The whole way of a model: data and weights in a store, a tracked run, a registered model, its answers years later."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pillsnap.cli import main
from pillsnap.config.load import save_settings
from pillsnap.config.schema import Settings
from pillsnap.registry import chosen
from pillsnap.registry import registered as module
from pillsnap.registry.registered import THRESHOLDS, champion, choose, register, registered, set_alias
from pillsnap.registry.store import ModelStore, open_store
from pillsnap.registry.tracking import Tracking, TrackingError, open_tracking
from pillsnap.registry.versions import push
from pillsnap.registry.weights import record_weights


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Run a command; returns what it printed, or its one sentence where it is refused."""
    capsys.readouterr()
    assert main(list(words)) == status, capsys.readouterr().err
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def answers(text: str) -> list[tuple[str, list[dict]]]:
    """Names of the photos, and all that is said of their pills, every digit."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [(Path(one["file"]).name, one["pills"]) for one in found]


def new_run(tracking: Tracking, store: ModelStore, folder: Path, task: str) -> str:
    """A run with weights in a store, and the best figure that there is; they are no network."""
    folder.mkdir()
    run_id = tracking.client.create_run(tracking.experiment).info.run_id
    (folder / "tracking.json").write_text(json.dumps({"url": tracking.url, "run_id": run_id}))
    (folder / "model.onnx").write_bytes(f"weights of {folder}".encode())
    record_weights(tracking, folder, store, push(store, task, {"model.onnx": folder / "model.onnx"}))
    tracking.client.log_metric(run_id, THRESHOLDS[task].metric, 1.0)
    tracking.client.set_terminated(run_id)
    return run_id


def test_train_register_and_infer_years_later(
    lakefs_repository: str,
    tiny_data: Path,
    tiny_settings: Callable[..., Settings],
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    place = [f"store.url={lakefs_repository}/main", "goals.top1=0.0", "goals.map50=0.0"]
    settings = tiny_settings(url, f"paths.cache_root={tmp_path / 'cache'}", *place)
    save_settings(settings, tmp_path / "config.yaml")
    with_settings = ["--cfg", str(tmp_path / "config.yaml")]
    run = ["--run", str(tmp_path / "run")]
    data = said(capsys, "data", "push", *with_settings, "--data-root", str(tiny_data)).strip()
    said(capsys, "train", *with_settings, "--data-root", data, "--run-dir", str(tmp_path / "run"))
    said(capsys, "evaluate", *run)
    said(capsys, "export", *run)
    assert "No weights of a classifier" in said(
        capsys, "models", "register", "classifier", *run, *with_settings, status=2
    )
    said(capsys, "models", "push", *run, *with_settings)
    missed = said(capsys, "models", "register", "classifier", *run, *with_settings, "goals.top1=1.0", status=1)
    assert re.search(r"not registered: test/single/top1 is [\d.]+, but goals.top1 asks for at least 1", missed)
    assert "champion" in said(capsys, "models", "register", "classifier", *with_settings)
    monkeypatch.setattr("builtins.input", lambda question: "1")
    assert "champion" in said(capsys, "models", "register", "detector", "--manual", *with_settings)
    tracking = open_tracking(settings)
    (model,) = registered(tracking, "classifier")
    assert model.tags["data_version"] == data and "/main/" not in model.source
    assert model.source == model.tags["weights.classifier"] and model.tags["git_revision"]
    first = answers(said(capsys, "models", "infer", *with_settings))
    assert len(first) > 8

    store = open_store(f"{lakefs_repository}/main")
    (tmp_path / "model.onnx").write_bytes(b"a later training")
    for _ in range(10):
        push(store, "classifier", {"model.onnx": tmp_path / "model.onnx"})
    with store.objects.change("the branch moves", {}) as change:
        change.write("models/classifier/v1/model.onnx", b"overwritten")
        change.write("models/data/v1/version.json", b"overwritten")
    later = ["models", "infer", *with_settings, f"paths.cache_root={tmp_path / 'another machine'}"]
    assert answers(said(capsys, *later)) == first

    for task in ("classifier", "detector", "quality"):  # others become the champions
        made = register(tracking, settings, task, new_run(tracking, store, tmp_path / task, task), tmp_path / "cache")
        set_alias(tracking, task, made.version, "champion")
    assert [str(champion(tracking, task).version) for task in ("classifier", "detector", "quality")] == ["2", "2", "1"]
    assert answers(said(capsys, *later, "--which", "1")) == first
    monkeypatch.setattr("builtins.input", lambda question: "2")  # of the table, the newest first
    assert answers(said(capsys, *later, "--interactive")) == first
    with monkeypatch.context() as away:
        search = type(tracking.client).search_model_versions

        def refuse(client: object, name: str, **more: object) -> object:
            if "quality" in name:
                raise MlflowException("Connection refused")
            return search(client, name, **more)

        away.setattr(type(tracking.client), "search_model_versions", refuse)
        gone = said(capsys, *later, "--which", "1", status=2)
    assert "Reading the registered models failed" in gone and "(Connection refused)" in gone
    later += ["--which", "1"]
    assert "There is no registered classifier 7" in said(capsys, *later, "--which", "7", status=2)
    tracking.client.set_model_version_tag(model.name, model.version, "sha256.store.classifier.model.onnx", "0" * 64)
    assert "holds other files than those that were recorded" in said(capsys, *later, status=2)
    lost = model.source.replace(model.source.split("/")[3], "0" * 64)
    tracking.client.set_model_version_tag(model.name, model.version, "weights.classifier", lost)
    assert "can't be opened" in said(capsys, *later, status=2)
    assert "failed at http://127.0.0.1:9" in said(capsys, *later, "tracking.url=http://127.0.0.1:9", status=2)


def test_weights_that_are_registered_twice_at_once_are_one_version(
    tiny_settings: Callable[..., Settings],
    url: str,
    tmp_path: Path,
):
    settings = tiny_settings(url, "goals.top1=0.5")
    tracking, store = open_tracking(settings), open_store(tmp_path / "store", writing=True)
    run = tracking.client.create_run(tracking.experiment)
    (tmp_path / "tracking.json").write_text(json.dumps({"url": tracking.url, "run_id": run.info.run_id}))
    (tmp_path / "model.onnx").write_bytes(b"weights")
    record_weights(tracking, tmp_path, store, push(store, "classifier", {"model.onnx": tmp_path / "model.onnx"}))
    with pytest.raises(TrackingError, match="has no figure test/single/top1, by which a classifier is judged"):
        register(tracking, settings, "classifier", run.info.run_id, tmp_path / "cache")
    tracking.client.log_metric(run.info.run_id, "test/single/top1", 0.75)

    def attempt(number: int) -> str:
        try:
            return str(register(tracking, settings, "classifier", run.info.run_id, tmp_path / f"cache{number}"))
        except TrackingError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attempt, range(4)))
    assert sum("are registered already" in text for text in found) == 3, found
    (model,) = registered(tracking, "classifier")
    assert choose(tracking, "classifier").version == model.version


def test_an_alias_that_an_interruption_has_left_out_is_given_by_the_next_attempt(
    tiny_settings: Callable[..., Settings], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = tiny_settings(url)
    tracking, store = open_tracking(settings), open_store(tmp_path / "store", writing=True)
    run_id = new_run(tracking, store, tmp_path / "run", "classifier")

    def killed(*arguments: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_name_first", killed)
        register(tracking, settings, "classifier", run_id, tmp_path / "cache")
    assert len(registered(tracking, "classifier")) == 1 and champion(tracking, "classifier") is None
    with pytest.raises(TrackingError, match="are registered already, as version 1"):
        register(tracking, settings, "classifier", run_id, tmp_path / "cache")
    assert champion(tracking, "classifier").version == registered(tracking, "classifier")[0].version


def test_a_model_is_used_with_those_of_its_training_or_of_its_time(
    tiny_settings: Callable[..., Settings], url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = tiny_settings(url)
    tracking, store = open_tracking(settings), open_store(tmp_path / "store", writing=True)

    def made(task: str, run_id: str = "") -> str:
        run_id = run_id or new_run(tracking, store, tmp_path / f"{task}{len(registered(tracking, task))}", task)
        done = register(tracking, settings, task, run_id, tmp_path / "cache")
        set_alias(tracking, task, done.version, "champion")
        return run_id

    def used(which: str) -> dict[str, str]:
        found = chosen.fetch_models(tracking, None, tmp_path / "models", tmp_path / "cache", which)
        return {task: str(version.version) for task, version in found.items()}

    for task in ("quality", "classifier", "detector", "segmenter", "quality"):
        made(task)
    assert used("1") == {"classifier": "1", "detector": "1", "quality": "1"} and "detector: version 1" in caplog.text
    assert used("champion") == {"classifier": "1", "detector": "1", "segmenter": "1", "quality": "2"}
    made("classifier")
    made("detector")
    assert used("2") == {"classifier": "2", "detector": "1", "segmenter": "1", "quality": "2"}, "as it was registered"
    assert used("champion") == {"classifier": "2", "detector": "2", "segmenter": "1", "quality": "2"}
    assert "the run of the classifier has none that is registered, so the champion" in caplog.text


def test_runs_are_found_on_every_page(
    tiny_settings: Callable[..., Settings], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tracking, store = open_tracking(tiny_settings(url)), open_store(tmp_path / "store", writing=True)
    made = {new_run(tracking, store, tmp_path / str(number), "classifier") for number in range(3)}
    monkeypatch.setattr(chosen, "_PAGE", 1)
    assert {run.info.run_id for run in chosen.runs_with_weights(tracking, "classifier")} == made


def test_data_without_photos_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    monkeypatch.setattr(chosen, "fetch_data", lambda address, cache: tmp_path)
    with pytest.raises(TrackingError, match="has no photos as files but archives: name photos"):
        chosen.photos_of_data({"data_version": "lakefs://pills/0123/models/data/v1"}, tmp_path)
