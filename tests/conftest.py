"""A tiny dataset and one short real run on it, shared by the tests that need a trained model."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from lakefs_stand_in import KEY, SECRET, StandIn
from tiny_models import client_for, photo_jpeg, save_classifier, save_detector

from pillsnap.bench import publish
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.sample import write as sample
from pillsnap.sample.plan import PlannedPhoto, plan_sample
from pillsnap.service.logging import Console, LogFile

HEAD = set(publish.HEAD)  # what every report of a benchmark has


def goal_values(report: dict) -> dict[str, float | None]:
    """The value of each goal of a report."""
    return {goal["name"]: goal["value"] for goal in report["goals"]}


TINY = [  # networks and sizes that train in seconds
    "model.classifier.name=test_efficientnet",
    "model.classifier.pretrained=false",
    "model.classifier.image_size=64",
    f"model.detector.name={Path(__file__).parent / 'tiny_detector.yaml'}",
    "model.detector.image_size=96",
    "identify.box_confidence=0.001",
    "train.classifier.epochs=1",
    "train.classifier.min_steps=0",
    "train.classifier.batch_size=8",
    "train.detector.epochs=1",
    "train.detector.min_steps=0",
    "train.detector.batch_size=4",
    "train.evaluations=2",
    "train.log_every=1",
    "train.channels_last=true",  # not measured
]


@pytest.fixture(autouse=True)
def remove_service_log_handlers() -> Iterator[None]:
    """Remove the log handlers of a service that ran in the process of a test."""
    yield
    for handler in [handler for handler in logging.getLogger().handlers if isinstance(handler, (Console, LogFile))]:
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models that a service can open."""
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder)
    save_detector(folder)
    return folder


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[TestClient]:
    """A service with the two tiny models."""
    with client_for(models) as opened:
        yield opened


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    """A photo of two pills that the tiny models know."""
    return photo_jpeg()


def few_drugs(seed: int = 42) -> list[PlannedPhoto]:
    """Three drugs and a dozen combinations of the sample's plan."""
    plan = plan_sample(seed)
    codes = sorted({photo.drugs[0].code for photo in plan if photo.single and photo.split == "train"})[:3]
    singles = [photo for photo in plan if photo.single and photo.drugs[0].code in codes]
    return singles + [photo for photo in plan if not photo.single and photo.split == "train"][:24]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, written like the embedded sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "plan_sample", few_drugs)
        return sample.write_sample(tmp_path_factory.mktemp("data") / "tiny", workers=1)


@pytest.fixture(scope="session")
def tiny_settings(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    """A function that makes settings for a run on the tiny dataset, with more overrides."""
    folder = tmp_path_factory.mktemp("project")

    def settings(*overrides: str, data: Path = tiny_data) -> Settings:
        merged = [*TINY, f"paths.cache_root={folder / 'cache'}", f"paths.run_root={folder / 'runs'}", *overrides]
        latest = {text.partition("=")[0]: text for text in merged}
        return load_settings(profile="cpu", data_root=data, overrides=list(latest.values()))

    return settings


@pytest.fixture(scope="session")
def trained_run(tiny_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, with half precision and `torch.compile`."""
    from pillsnap.training.run import train

    return train(tiny_settings("train.amp=bf16", "train.compile=default"), tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="session")
def lakefs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn | None]:
    """A running lakeFS: what stands in for it, or, where LAKEFS_ENDPOINT is set, that server with its keys (None)."""
    if "LAKEFS_ENDPOINT" in os.environ:
        yield None
        return
    server = StandIn(tmp_path_factory.mktemp("lakefs"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def lakefs_repository(lakefs_server: StandIn | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an own repository; its server and keys are in the environment."""
    import lakefs

    name = f"pills-{uuid4().hex[:12]}"
    endpoint = lakefs_server.endpoint if lakefs_server else os.environ["LAKEFS_ENDPOINT"]
    monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", endpoint)
    if lakefs_server:
        monkeypatch.setenv("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", SECRET)
    lakefs.Repository(name, lakefs.Client()).create(f"local://{name}")
    return f"lakefs://{name}"


@pytest.fixture(scope="session")
def empty_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty file of records; making its tables takes seconds."""
    from pillsnap.registry.tracking import open_tracking

    path = tmp_path_factory.mktemp("records") / "mlflow.db"
    open_tracking(load_settings(profile="cpu", overrides=[f"tracking.url=sqlite:///{path}", "tracking.experiment=no"]))
    return path


@pytest.fixture
def url(empty_records: Path, tmp_path: Path) -> str:
    """Records of one test."""
    shutil.copy(empty_records, tmp_path / "mlflow.db")
    return f"tracking.url=sqlite:///{tmp_path / 'mlflow.db'}"
