"""The web service as a caller sees it, with two real, tiny ONNX models."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from pillsnap.config import Environment, load_settings
from pillsnap.runtime.identify import Identifier
from pillsnap.serve import create_app
from tiny_models import ANOTHER, CONFIG, DRUGS, KEY, RIGHT, huge_png, photo_jpeg, save_classifier


def client_for(folder: Path | None, keys: tuple[str, ...] = (RIGHT, ANOTHER), *settings: str, **more: object) -> TestClient:
    environment = Environment(api_keys=keys, model_path=folder, cors_allow_origins=["https://pillsnap.co.kr"], **more)
    return TestClient(create_app(load_settings(CONFIG, settings or ["serve.requests_per_minute=0"]), environment), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[TestClient]:
    with client_for(models) as opened:
        yield opened


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return photo_jpeg()


def ask(client: TestClient, photo: bytes, query: str = "", headers: dict[str, str] = KEY) -> Response:
    return client.post(f"/predict{query}", headers=headers, files={"image": ("photo.jpg", photo, "image/jpeg")})


def refused(response: Response, status: int, word: str = "") -> None:
    """The status, one sentence as detail, a code, the number of the request, and nothing of the server's inside."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"detail", "code", "request_id"} and response.headers.get_list("x-request-id") == [response.json()["request_id"]]
    assert response.json()["code"].replace("_", "").isalpha() and len(response.json()["request_id"]) == 32
    detail = response.json()["detail"]
    assert isinstance(detail, str) and word in detail and "Traceback" not in detail and len(detail.split()) > 1


def test_health_with_a_model(client: TestClient) -> None:
    answer = client.get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert health["status"] == "ok" and health["advice"] is None and health["version"]
    assert health["engines"] == {"classifier": "CPUExecutionProvider", "detector": "CPUExecutionProvider"}
    assert health["features"] == "production" and health["uptime_seconds"] >= 0
    assert len(health["model"].pop("version")) == 12
    assert health["model"] == {"classifier": "tiny classifier", "detector": "tiny detector", "classes": 3,
                               "class_map_hash": DRUGS.hash, "classifier_size": 64, "detector_size": 320}


@pytest.mark.parametrize("folder", [None, "empty", "missing"])
def test_health_and_predict_without_a_model(folder: str | None, tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "empty").mkdir()
    bare = client_for(tmp_path / folder if folder else None)
    health = bare.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "no model" and health.json()["model"] is None
    assert "make demo" in health.json()["advice"] and str(tmp_path) not in health.text
    refused(ask(bare, jpeg), 503, "MODEL_PATH")
    assert bare.get("/health").status_code == 200


def test_a_model_that_appears_later_is_used(tmp_path: Path, jpeg: bytes) -> None:
    late = client_for(tmp_path)
    refused(ask(late, jpeg), 503)
    save_classifier(tmp_path)
    assert ask(late, jpeg).status_code == 200
    refused(ask(late, jpeg, "?pipeline=combo"), 422, "detector")


def test_damaged_model_is_no_model(models: Path, tmp_path: Path, jpeg: bytes) -> None:
    data = (models / "classifier.onnx").read_bytes()
    (tmp_path / "classifier.onnx").write_bytes(data[: len(data) // 2])
    broken = client_for(tmp_path)
    assert broken.get("/health").json()["status"] == "no model"
    refused(ask(broken, jpeg), 503, "classifier.onnx")


def check_pill(pill: dict) -> None:
    drug = {"code", "edi_codes", "name", "maker", "details", "confidence"}
    assert set(pill) == drug | {"box", "box_confidence", "sure", "candidates"}
    assert set(pill["box"]) == {"x1", "y1", "x2", "y2"}
    assert pill["code"].startswith("K-") and isinstance(pill["edi_codes"], list) and 0 <= pill["confidence"] <= 1
    assert pill["candidates"][0] == {name: pill[name] for name in drug}
    ranked = [candidate["confidence"] for candidate in pill["candidates"]]
    assert ranked == sorted(ranked, reverse=True) and sum(ranked) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("query, pipeline, codes", [
    ("", "single", ["K-000030"]), ("?pipeline=single", "single", ["K-000030"]), ("?pipeline=combo", "combo", ["K-000030", "K-000007"]),
])
def test_predict_schema(client: TestClient, jpeg: bytes, query: str, pipeline: str, codes: list[str]) -> None:
    response = ask(client, jpeg, query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert set(answer) == {"pipeline", "photo", "pills", "timings_ms", "notes", "hint", "annotated", "notice", "model"}
    assert answer["photo"] == {"width": 640, "height": 480} and "medical advice" in answer["notice"] and answer["annotated"] is None
    assert answer["pipeline"] == pipeline and [pill["code"] for pill in answer["pills"]] == codes
    for pill in answer["pills"]:
        check_pill(pill)
    assert answer["pills"][0]["edi_codes"] == ["649900030"] and answer["pills"][0]["sure"]
    if pipeline == "combo":
        assert answer["pills"][1]["edi_codes"] == ["641600010", "641600011"]
    assert list(answer["timings_ms"]) == ["decode", "detect", "crop", "classify", "total"]
    assert all(value >= 0 for value in answer["timings_ms"].values())
    assert (answer["hint"] or {}).get("pipeline") == ("combo" if pipeline == "single" else None), "recommended, never switched"
    assert answer["model"]["class_map_hash"] == DRUGS.hash


def test_key_is_wanted(client: TestClient, models: Path, jpeg: bytes) -> None:
    refused(ask(client, jpeg, headers={}), 401, "X-API-Key")
    refused(ask(client, jpeg, headers={"X-API-Key": ""}), 401)
    for wrong in ("wrong", RIGHT[:-1], f"{RIGHT}2", f"{RIGHT},{ANOTHER}", "schl\u00fcssel".encode("latin-1")):
        refused(ask(client, jpeg, headers={"X-API-Key": wrong}), 403)
    assert ask(client, jpeg, headers={"X-API-Key": ANOTHER}).status_code == 200
    for path in ("/version", "/classes"):
        refused(client.get(path), 401, "X-API-Key")
        assert client.get(path, headers=KEY).status_code == 200
    refused(ask(client_for(models, ()), jpeg), 503, "API_KEY")
    assert ask(client_for(models, (), allow_weak_keys=True), jpeg, headers={}).status_code == 200


def test_a_key_that_asks_too_often_is_told_when_to_come_again(models: Path, jpeg: bytes) -> None:
    client = client_for(models, (RIGHT, ANOTHER), "serve.requests_per_minute=3")
    assert [ask(client, jpeg).status_code for _ in range(3)] == [200] * 3
    late = ask(client, jpeg)
    refused(late, 429, "3 photos")
    assert 1 <= int(late.headers["retry-after"]) <= 60
    assert ask(client, jpeg, headers={"X-API-Key": ANOTHER}).status_code == 200, "another key notices nothing"
    assert client.get("/version", headers=KEY).status_code == client.get("/health").status_code == 200


@pytest.mark.parametrize("key, words", [("", "No API key is set"), ("short", "5 characters"), ("change-me-change-me", "example"), (f"{RIGHT},pillsnap-test-key", "Key 2 of 2")])
def test_a_server_with_keys_that_protect_nothing_does_not_start(models: Path, tmp_path: Path, key: str, words: str) -> None:
    command = [sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", "0"]
    environment = {**os.environ, "API_KEY": key, "MODEL_PATH": str(models), "PYTHONPATH": str(CONFIG.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not key or key.split(",")[-1] not in done.stderr


@pytest.mark.parametrize("level, text, words", [("LOUD", "", "LOG_LEVEL is 'LOUD'"), ("INFO", "serve:\n  queue: many\n", "serve.queue"), ("INFO", "serve: [", "config.yaml")])
def test_a_server_with_settings_that_cannot_be_used_does_not_start(tmp_path: Path, level: str, text: str, words: str) -> None:
    if text:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "API_KEY": RIGHT, "LOG_LEVEL": level, "PYTHONPATH": str(CONFIG.parent)}
    done = subprocess.run([sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ready_version_and_classes(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/ready").json() == {"ready": True}
    refused(client_for(tmp_path).get("/ready"), 503, "MODEL_PATH")
    refused(client_for(tmp_path).get("/classes", headers=KEY), 503, "classifier.onnx")
    version = client.get("/version", headers=KEY).json()
    assert set(version) == {"version", "model", "git_revision", "created", "opened"} and version["model"]["class_map_hash"] == DRUGS.hash
    drugs = client.get("/classes", headers=KEY).json()
    assert [drug["code"] for drug in drugs] == list(DRUGS.codes) and drugs[0] == {"code": "K-000007", "name": "Red capsule", "edi_codes": ["641600010", "641600011"], "maker": "Example Pharma", "details": {"shape": "oblong"}}


def test_a_request_keeps_the_number_that_it_came_with(client: TestClient) -> None:
    number = "0123456789abcdef0123456789abcdef"
    assert client.get("/health", headers={"X-Request-ID": number}).headers["x-request-id"] == number
    for bad in ("1", "x" * 5000, "<script>"):
        assert len(client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]) == 32


def test_nothing_that_is_sent_brings_it_down(client: TestClient, jpeg: bytes) -> None:
    refused(ask(client, b"two white tablets and a red capsule"), 415, "JPEG")
    refused(ask(client, b""), 415, "empty")
    refused(ask(client, jpeg[: len(jpeg) // 2]), 422, "damaged")
    refused(ask(client, huge_png()), 422, "pixels")
    refused(ask(client, bytes(20_000_001)), 413, "20 MB")
    refused(ask(client, bytes(25_000_000)), 413, "20 MB")
    refused(ask(client, jpeg, "?pipeline=automatic"), 422, "combo")
    refused(client.post("/predict", headers=KEY), 415, "image")
    refused(client.post("/predict", headers=KEY, content=jpeg), 415, "multipart")
    refused(client.post("/predict", headers=KEY, files={"photo": jpeg}), 422, "image")
    refused(client.post("/predict", headers=KEY, files=[("image", jpeg), ("image", jpeg)]), 422, "one photo")
    refused(client.get("/predict", headers=KEY), 405)
    refused(client.get("/nowhere"), 404, "Not Found")
    assert client.get("/health").status_code == 200
    assert ask(client, jpeg).status_code == 200


def test_upload_without_a_length_is_refused_too(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        for _ in range(60):
            yield bytes(1_000_000)

    response = client.post("/predict", headers=KEY | {"Content-Type": "multipart/form-data; boundary=x"}, content=pieces())
    refused(response, 413, "20 MB")


def test_unexpected_error_is_one_sentence(client: TestClient, jpeg: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Identifier, "cut", fail)
    response = ask(client, jpeg)
    refused(response, 500)
    assert "secret" not in response.text and "a secret of the server" in caplog.text
    monkeypatch.undo()
    assert client.get("/health").status_code == 200 and ask(client, jpeg).status_code == 200


def test_health_answers_while_photos_are_worked_on(client: TestClient, jpeg: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    cut = Identifier.cut

    def slow(self: Identifier, *arguments: object) -> object:
        started.set()
        go_on.wait(10)
        return cut(self, *arguments)

    monkeypatch.setattr(Identifier, "cut", slow)
    answers = []
    worker = threading.Thread(target=lambda: answers.append(ask(client, jpeg).status_code))
    worker.start()
    assert started.wait(10)
    before = time.perf_counter()
    assert client.get("/health").status_code == 200
    assert time.perf_counter() - before < 5 and not answers
    go_on.set()
    worker.join(10)
    assert answers == [200]


def test_only_listed_pages_may_call(client: TestClient) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-API-Key"}
    allowed = client.options("/predict", headers=asked | {"Origin": "https://pillsnap.co.kr"})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://pillsnap.co.kr"
    other = client.options("/predict", headers=asked | {"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in other.headers


def test_starts_anywhere_and_without_training_software(tmp_path: Path) -> None:
    check = ("import sys\nimport pillsnap.serve\nassert pillsnap.serve.app.title == 'pillsnap'\n"
             "print(sorted({'torch', 'timm', 'ultralytics', 'matplotlib'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
