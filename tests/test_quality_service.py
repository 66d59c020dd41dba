"""Photo quality as a client of the service sees it, with real, tiny ONNX models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tiny_models import KEY, client_for, photo_jpeg, post_photo, save_quality

from pillsnap.answer.factory import load_identifier
from pillsnap.service.client.local import predict_local
from pillsnap.service.client.table import as_table
from pillsnap.service.inference.model_manager import load

BRIGHT, DARK = photo_jpeg(), photo_jpeg(0.2)


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models with a judge beside them."""
    made = shutil.copytree(models, tmp_path_factory.mktemp("judged") / "models")
    save_quality(made)
    return made


@pytest.fixture(scope="module")
def judged(folder: Path) -> Iterator[TestClient]:
    with client_for(folder) as opened:
        yield opened


def test_a_prediction_tells_the_quality_and_refuses_nothing(judged: TestClient, client: TestClient):
    for photo, good in ((BRIGHT, True), (DARK, False)):
        answer = post_photo(judged, photo)
        assert answer.status_code == 200 and answer.json()["pills"] == post_photo(client, photo).json()["pills"]
        quality = answer.json()["quality"]
        assert quality["good_enough"] == good and (quality["tier"] in "SA") == good and 0 <= quality["score"] <= 1
        assert [reason["reason"] for reason in quality["reasons"]] == ([] if good else ["too_dark"])
        assert answer.json()["timings_ms"]["judge"] > 0
    assert "어둡습니다" in quality["reasons"][0]["ko"] and "too dark" in quality["reasons"][0]["en"]


def test_a_caller_may_require_quality(judged: TestClient):
    assert post_photo(judged, BRIGHT, "?quality=require").json()["quality"]["good_enough"]
    for pipeline in ("single", "combo"):
        refused = post_photo(judged, DARK, f"?quality=require&pipeline={pipeline}")
        body = refused.json()
        assert refused.status_code == 422 and set(body) == {"detail", "code", "request_id", "quality"}
        assert body["code"] == "not_good_enough" and "It is too dark: switch on a light" in body["detail"]
        assert body["quality"]["reasons"][0].keys() == {"reason", "probability", "ko", "en"}
    form = judged.post("/predict", headers=KEY, files={"image": DARK}, data={"quality": "require"})
    assert form.status_code == 422 and form.json()["code"] == "not_good_enough"
    assert post_photo(judged, BRIGHT, "?quality=perfect").json()["code"] == "invalid_parameter"


def test_several_pills_are_as_good_as_the_worst(judged: TestClient):
    first, worst = (post_photo(judged, BRIGHT, f"?pipeline={name}").json()["quality"] for name in ("single", "combo"))
    assert worst["score"] < first["score"], "the red capsule is darker than the white tablet"


def test_models_without_a_judge_say_so(judged: TestClient, client: TestClient):
    assert judged.get("/health").json()["model"]["quality"] == "tiny quality"
    assert client.get("/health").json()["model"]["quality"] is None
    assert post_photo(client, DARK).json()["quality"] is None
    for refused in (
        post_photo(client, BRIGHT, "?quality=require"),
        client.post("/quality", headers=KEY, files={"image": BRIGHT}),
    ):
        assert refused.status_code == 422 and refused.json()["code"] == "quality_unavailable"
        assert "quality.onnx" in refused.json()["detail"]


def test_a_batch_names_the_reasons_of_what_it_refuses(judged: TestClient):
    files = [("images", BRIGHT), ("images", DARK)]
    good, poor = judged.post("/batch?quality=require", headers=KEY, files=files).json()["answers"]
    assert good["prediction"]["quality"]["good_enough"] and good["problem"] is None
    assert poor["prediction"] is None and poor["problem"]["code"] == "not_good_enough"
    assert poor["problem"]["quality"]["reasons"][0]["reason"] == "too_dark"
    _, told = judged.post("/batch", headers=KEY, files=files).json()["answers"]
    assert not told["prediction"]["quality"]["good_enough"]


def test_a_frame_is_judged_without_naming_pills(judged: TestClient):
    for photo in (BRIGHT, DARK):
        answer = judged.post("/quality", headers=KEY, files={"image": photo})
        assert answer.status_code == 200 and answer.json() == post_photo(judged, photo).json()["quality"]
    assert judged.post("/quality", files={"image": BRIGHT}).status_code == 401
    assert judged.post("/quality", headers=KEY, files={"image": b"text"}).status_code == 415
    unknown = judged.post("/quality", headers=KEY, files={"image": BRIGHT}, data={"top_k": "1"})
    assert unknown.json()["code"] == "unknown_parameter"


def test_frames_have_a_limit_of_their_own(folder: Path):
    few = client_for(folder, (KEY["X-API-Key"],), "serve.requests_per_minute=1")
    statuses = [few.post("/quality", headers=KEY, files={"image": BRIGHT}).status_code for _ in range(11)]
    assert statuses == [200] * 10 + [429]
    assert [post_photo(few, BRIGHT).status_code for _ in range(2)] == [200, 429]


def test_the_smallest_service_judges_the_whole_photo(folder: Path):
    small = client_for(folder, (KEY["X-API-Key"],), "serve.features=mvp", "serve.requests_per_minute=0")
    assert post_photo(small, BRIGHT).json()["quality"]["score"] < 0.6, "the ground is grey"


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_damaged_judge_is_said(folder: Path, tmp_path: Path, content: bytes):
    for file in folder.glob("*.onnx"):
        (tmp_path / file.name).write_bytes(content if file.name == "quality.onnx" else file.read_bytes())
    broken = client_for(tmp_path)
    assert broken.get("/health").json()["status"] == "no model"
    answer = post_photo(broken, BRIGHT)
    assert answer.status_code == 503 and "quality.onnx" in answer.json()["detail"]


def test_the_client_tells_it_before_the_answer(folder: Path, judged: TestClient):
    loaded = load(folder, load_identifier)
    local = predict_local(loaded, DARK)
    assert local["quality"] == post_photo(judged, DARK).json()["quality"]
    first, *rows = as_table([(Path("dark.jpg"), local), (Path("old.jpg"), local | {"quality": None})]).splitlines()
    assert first.startswith("dark.jpg: not good enough") and "It is too dark" in first and "photo" in rows[0]
    assert not any("not good enough" in row for row in rows)
