"""The web service as a client sees it, with two real, tiny ONNX models."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pillow_heif
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tiny_models import (
    ANOTHER,
    CONFIG,
    DRUGS,
    KEY,
    RIGHT,
    check_error,
    client_for,
    huge_png,
    post_photo,
    save_classifier,
)

from pillsnap.answer.cropping import Cropper


def test_health_with_a_model(client: TestClient) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    health = response.json()
    assert health["status"] == "ok" and health["advice"] is None and health["version"]
    assert health["engines"] == {"classifier": "CPUExecutionProvider", "detector": "CPUExecutionProvider"}
    assert health["features"] == "production" and health["uptime_seconds"] >= 0
    assert len(health["model"].pop("version")) == 12
    assert health["model"] == {
        "classifier": "tiny classifier",
        "detector": "tiny detector",
        "quality": None,
        "segmenter": None,
        "classes": 3,
        "class_map_hash": DRUGS.hash,
        "classifier_size": 64,
        "detector_size": 320,
        "color": "none",
        "background": "keep",
    }


@pytest.mark.parametrize("folder", [None, "empty", "missing"])
def test_health_and_predict_without_a_model(folder: str | None, tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "empty").mkdir()
    bare = client_for(tmp_path / folder if folder else None)
    health = bare.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "no model" and health.json()["model"] is None
    assert "make demo" in health.json()["advice"] and str(tmp_path) not in health.text
    check_error(post_photo(bare, jpeg), 503, "MODEL_PATH")
    assert bare.get("/health").status_code == 200


def test_a_model_that_appears_later_is_loaded(tmp_path: Path, jpeg: bytes) -> None:
    late = client_for(tmp_path)
    check_error(post_photo(late, jpeg), 503)
    save_classifier(tmp_path)
    assert post_photo(late, jpeg).status_code == 200
    check_error(post_photo(late, jpeg, "?pipeline=combo"), 422, "detector")


def test_a_damaged_model_counts_as_no_model(models: Path, tmp_path: Path, jpeg: bytes) -> None:
    data = (models / "classifier.onnx").read_bytes()
    (tmp_path / "classifier.onnx").write_bytes(data[: len(data) // 2])
    broken = client_for(tmp_path)
    assert broken.get("/health").json()["status"] == "no model"
    check_error(post_photo(broken, jpeg), 503, "classifier.onnx")


def check_pill(pill: dict) -> None:
    drug = {"code", "edi_codes", "name", "maker", "details", "confidence"}
    assert set(pill) == drug | {
        "box",
        "box_confidence",
        "verdict",
        "alike",
        "reason",
        "differ",
        "candidates",
        "imprint",
    }
    assert set(pill["box"]) == {"x1", "y1", "x2", "y2"}
    assert pill["code"].startswith("K-") and isinstance(pill["edi_codes"], list) and 0 <= pill["confidence"] <= 1
    assert pill["candidates"][0] == {name: pill[name] for name in drug}
    ranked = [candidate["confidence"] for candidate in pill["candidates"]]
    assert ranked == sorted(ranked, reverse=True) and sum(ranked) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "query, pipeline, codes",
    [
        ("", "single", ["K-000030"]),
        ("?pipeline=single", "single", ["K-000030"]),
        ("?pipeline=combo", "combo", ["K-000030", "K-000007"]),
    ],
)
def test_predict_schema(client: TestClient, jpeg: bytes, query: str, pipeline: str, codes: list[str]) -> None:
    response = post_photo(client, jpeg, query)
    assert response.status_code == 200, response.text
    prediction = response.json()
    assert set(prediction) == {
        "pipeline",
        "photo",
        "quality",
        "pills",
        "timings_ms",
        "notes",
        "hint",
        "annotated",
        "notice",
        "model",
    }
    assert (
        prediction["photo"] == {"width": 640, "height": 480}
        and "medical advice" in prediction["notice"]
        and prediction["annotated"] is None
    )
    assert prediction["pipeline"] == pipeline and [pill["code"] for pill in prediction["pills"]] == codes
    for pill in prediction["pills"]:
        check_pill(pill)
    assert prediction["pills"][0]["edi_codes"] == ["649900030"] and prediction["pills"][0]["verdict"] == "identified"
    if pipeline == "combo":
        assert prediction["pills"][1]["edi_codes"] == ["641600010", "641600011"]
    assert list(prediction["timings_ms"]) == ["decode", "detect", "crop", "classify", "imprint", "total"]
    assert all(value >= 0 for value in prediction["timings_ms"].values())
    assert (prediction["hint"] or {}).get("pipeline") == ("combo" if pipeline == "single" else None), (
        "recommended, never switched"
    )
    assert prediction["model"]["class_map_hash"] == DRUGS.hash


def test_the_photo_in_the_colours_that_were_compared_is_sent_on_request(client: TestClient, jpeg: bytes) -> None:
    assert "corrected" not in post_photo(client, jpeg).json()
    shown = post_photo(client, jpeg, "?corrected=true").json()["corrected"]
    assert shown.startswith("data:image/jpeg;base64,")


def test_api_key_is_required(client: TestClient, models: Path, jpeg: bytes) -> None:
    check_error(post_photo(client, jpeg, headers={}), 401, "X-API-Key")
    check_error(post_photo(client, jpeg, headers={"X-API-Key": ""}), 401)
    for wrong in ("wrong", RIGHT[:-1], f"{RIGHT}2", f"{RIGHT},{ANOTHER}", "schl\u00fcssel".encode("latin-1")):
        check_error(post_photo(client, jpeg, headers={"X-API-Key": wrong}), 403)
    assert post_photo(client, jpeg, headers={"X-API-Key": ANOTHER}).status_code == 200
    for path in ("/version", "/classes"):
        check_error(client.get(path), 401, "X-API-Key")
        assert client.get(path, headers=KEY).status_code == 200
    check_error(post_photo(client_for(models, ()), jpeg), 503, "API_KEY")
    assert post_photo(client_for(models, (), allow_weak_keys=True), jpeg, headers={}).status_code == 200


def test_rate_limit_returns_429_and_retry_after(models: Path, jpeg: bytes) -> None:
    client = client_for(models, (RIGHT, ANOTHER), "serve.requests_per_minute=3")
    assert [post_photo(client, jpeg).status_code for _ in range(3)] == [200] * 3
    late = post_photo(client, jpeg)
    check_error(late, 429, "3 photos")
    assert 1 <= int(late.headers["retry-after"]) <= 60
    assert post_photo(client, jpeg, headers={"X-API-Key": ANOTHER}).status_code == 200, "another key is not affected"
    assert client.get("/version", headers=KEY).status_code == client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "key, words",
    [
        ("", "No API key is set"),
        ("short", "5 characters"),
        ("change-me-change-me", "example"),
        (f"{RIGHT},pillsnap-test-key", "Key 2 of 2"),
    ],
)
def test_a_server_with_weak_keys_does_not_start(models: Path, tmp_path: Path, key: str, words: str) -> None:
    command = [sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", "0"]
    environment = {**os.environ, "API_KEY": key, "MODEL_PATH": str(models), "PYTHONPATH": str(CONFIG.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not key or key.split(",")[-1] not in done.stderr


@pytest.mark.parametrize(
    "level, text, words",
    [
        ("LOUD", "", "LOG_LEVEL is 'LOUD'"),
        ("INFO", "serve:\n  queue: many\n", "serve.queue"),
        ("INFO", "serve: [", "config.yaml"),
    ],
)
def test_a_server_with_invalid_settings_does_not_start(tmp_path: Path, level: str, text: str, words: str) -> None:
    if text:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    environment = {**os.environ, "API_KEY": RIGHT, "LOG_LEVEL": level, "PYTHONPATH": str(CONFIG.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", "0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "settings, variables, words",
    [
        ("", {"ADMIN_KEY": f"Qm3-vT8yLs_w5Kd0XzRa,{RIGHT}"}, ["API_KEY", "ADMIN_KEY", "a key of its own"]),
        ("", {"ADMIN_KEY": RIGHT, "ALLOW_WEAK_KEYS": "1"}, ["API_KEY", "ADMIN_KEY"]),
        ("serve:\n  engine: openvno\n", {}, ["serve.engine", "did you mean openvino?"]),
        ("", {"CORS_ALLOW_ORIGINS": "nonsense"}, ["CORS_ALLOW_ORIGINS", "https://pillsnap.co.kr"]),
        (None, {}, [".env", "is not UTF-8"]),
    ],
)
def test_a_start_that_would_ignore_a_mistake_is_refused_in_one_sentence(
    models: Path, tmp_path: Path, settings: str | None, variables: dict[str, str], words: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(settings or "", encoding="utf-8")
    if settings is None:
        (tmp_path / ".env").write_text(f"API_KEY={RIGHT}\n", encoding="utf-16")
    environment = {**os.environ, "API_KEY": RIGHT, "MODEL_PATH": str(models), "PYTHONPATH": str(CONFIG.parent)}
    command = [sys.executable, "-m", "uvicorn", "pillsnap.serve:app", "--port", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3 and "Traceback" not in done.stderr and RIGHT not in done.stderr, done.stderr
    assert any(all(word in line for word in words) for line in done.stderr.splitlines()), done.stderr


def test_ready_version_and_classes(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/ready").json() == {"ready": True}
    check_error(client_for(tmp_path).get("/ready"), 503, "MODEL_PATH")
    check_error(client_for(tmp_path).get("/classes", headers=KEY), 503, "classifier.onnx")
    version = client.get("/version", headers=KEY).json()
    assert (
        set(version) == {"version", "model", "git_revision", "created", "opened"}
        and version["model"]["class_map_hash"] == DRUGS.hash
    )
    drugs = client.get("/classes", headers=KEY).json()
    assert [drug["code"] for drug in drugs] == list(DRUGS.codes) and drugs[0] == {
        "code": "K-000007",
        "name": "Red capsule",
        "edi_codes": ["641600010", "641600011"],
        "maker": "Example Pharma",
        "details": {"shape": "oblong"},
    }


def test_request_id_is_kept(client: TestClient) -> None:
    number = "0123456789abcdef0123456789abcdef"
    assert client.get("/health", headers={"X-Request-ID": number}).headers["x-request-id"] == number
    for bad in ("1", "x" * 5000, "<script>"):
        assert len(client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]) == 32


def test_bad_uploads_get_4xx_and_the_server_survives(client: TestClient, jpeg: bytes) -> None:
    check_error(post_photo(client, b"two white tablets and a red capsule"), 415, "JPEG")
    check_error(post_photo(client, b""), 415, "empty")
    check_error(post_photo(client, jpeg[: len(jpeg) // 2]), 422, "damaged")
    check_error(post_photo(client, huge_png()), 422, "pixels")
    check_error(post_photo(client, bytes(20_000_001)), 413, "20 MB")
    check_error(post_photo(client, bytes(25_000_000)), 413, "20 MB")
    check_error(post_photo(client, jpeg, "?pipeline=automatic"), 422, "combo")
    check_error(client.post("/predict", headers=KEY), 415, "image")
    check_error(client.post("/predict", headers=KEY, content=jpeg), 415, "multipart")
    check_error(client.post("/predict", headers=KEY, files={"photo": jpeg}), 422, "image")
    check_error(client.post("/predict", headers=KEY, files=[("image", jpeg), ("image", jpeg)]), 422, "one photo")
    check_error(client.get("/predict", headers=KEY), 405)
    check_error(client.get("/nowhere"), 404, "Not Found")
    assert client.get("/health").status_code == 200
    assert post_photo(client, jpeg).status_code == 200


def test_upload_without_content_length_is_limited_too(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        for _ in range(60):
            yield bytes(1_000_000)

    response = client.post(
        "/predict", headers=KEY | {"Content-Type": "multipart/form-data; boundary=x"}, content=pieces()
    )
    check_error(response, 413, "20 MB")


def test_unexpected_error_is_one_sentence(
    client: TestClient, jpeg: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Cropper, "crop_pills", fail)
    response = post_photo(client, jpeg)
    check_error(response, 500)
    assert "secret" not in response.text and "a secret of the server" in caplog.text
    monkeypatch.undo()
    assert client.get("/health").status_code == 200 and post_photo(client, jpeg).status_code == 200


@pytest.mark.parametrize("pipeline", ["single", "combo"])
def test_boxes_are_in_pixels_of_the_photo_that_was_sent(
    models: Path, client: TestClient, jpeg: bytes, pipeline: str
) -> None:
    whole = post_photo(client, jpeg, f"?pipeline={pipeline}").json()
    width, height = Image.open(io.BytesIO(jpeg)).size
    with client_for(
        models, (RIGHT,), "serve.requests_per_minute=0", f"data.max_pixels={width * height // 2}"
    ) as opened:
        reduced = post_photo(opened, jpeg, f"?pipeline={pipeline}&annotate=true").json()
    assert reduced["photo"] == whole["photo"] == {"width": width, "height": height}
    assert [pill["code"] for pill in reduced["pills"]] == [pill["code"] for pill in whole["pills"]]
    for pill, same in zip(reduced["pills"], whole["pills"], strict=True):
        assert all(abs(pill["box"][side] - same["box"][side]) < 0.05 * width for side in pill["box"])


def test_half_a_photo_is_never_answered(client: TestClient, jpeg: bytes) -> None:
    for data in (jpeg[: len(jpeg) // 2], jpeg[: len(jpeg) // 2] + b"\xff\xd9", jpeg[:-400] + bytes(400)):
        check_error(post_photo(client, data), 422, "damaged")


def test_a_photo_without_colour_gets_a_note_and_is_not_identified(client: TestClient, jpeg: bytes) -> None:
    assert post_photo(client, jpeg).json()["pills"][0]["verdict"] == "identified"
    for mode in ("L", "RGB"):
        grey = io.BytesIO()
        Image.open(io.BytesIO(jpeg)).convert("L").convert(mode).save(grey, "JPEG")
        answer = post_photo(client, grey.getvalue(), "?pipeline=combo").json()
        assert sum("no colour" in note for note in answer["notes"]) == 1
        assert answer["pills"] and not any(pill["verdict"] == "identified" for pill in answer["pills"])


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "TIFF", "GIF"])
def test_a_photo_of_any_format_is_predicted(client: TestClient, jpeg: bytes, kind: str) -> None:
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(file, kind)
    answer = post_photo(client, file.getvalue())
    assert answer.status_code == 200 and answer.json()["pills"][0]["code"] == "K-000030"


def test_at_most_half_of_the_threads_hold_the_pixels_of_a_photo(
    models: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop_pills, lock, now, most = Cropper.crop_pills, threading.Lock(), [0], [0]

    def counted(self: Cropper, *arguments: object) -> object:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.1)
        with lock:
            now[0] -= 1
        return crop_pills(self, *arguments)

    statuses: list[int] = []
    with client_for(models, (RIGHT,), "serve.workers=4", "serve.requests_per_minute=0") as opened:
        monkeypatch.setattr(Cropper, "crop_pills", counted)
        senders = [
            threading.Thread(target=lambda: statuses.append(post_photo(opened, jpeg).status_code)) for _ in range(8)
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(30)
    assert statuses == [200] * 8 and most[0] == 2


def test_health_responds_while_photos_are_processed(
    client: TestClient, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    crop_pills = Cropper.crop_pills

    def slow(self: Cropper, *arguments: object) -> object:
        started.set()
        go_on.wait(10)
        return crop_pills(self, *arguments)

    monkeypatch.setattr(Cropper, "crop_pills", slow)
    statuses = []
    worker = threading.Thread(target=lambda: statuses.append(post_photo(client, jpeg).status_code))
    worker.start()
    assert started.wait(10)
    before = time.perf_counter()
    assert client.get("/health").status_code == 200
    assert time.perf_counter() - before < 5 and not statuses
    go_on.set()
    worker.join(10)
    assert statuses == [200]


@pytest.mark.parametrize(
    "query, fields, words",
    [
        ("?pipelin=combo", {}, "did you mean pipeline?"),
        ("?PIPELINE=combo", {}, "'PIPELINE'"),
        ("?k=2", {}, "conf_threshold, top_k, annotate"),
        ("?pipeline=single&pipeline=combo", {}, "2 times"),
        ("", {"pipelin": "combo"}, "did you mean pipeline?"),
        ("", {"pipeline": ["single", "combo"]}, "send it once"),
        ("", {"top_k": "0"}, "top_k"),
        ("", {"pipeline": "automatic"}, "combo (several pills)"),
        ("?pipeline=single", {"pipeline": "combo"}, "pipeline is single in the address and combo in the form"),
        ("?top_k=2", {"top_k": "3"}, "send it once"),
    ],
)
@pytest.mark.parametrize("address, field", [("/predict", "image"), ("/batch", "images")])
def test_a_question_that_would_be_ignored_is_refused(
    client: TestClient, jpeg: bytes, address: str, field: str, query: str, fields: dict, words: str
) -> None:
    response = client.post(f"{address}{query}", headers=KEY, files={field: jpeg}, data=fields)
    check_error(response, 422, words)


def test_parameters_may_be_fields_of_the_form(client: TestClient, jpeg: bytes) -> None:
    fields = {"pipeline": "combo", "top_k": "2", "conf_threshold": "0.1", "annotate": "true"}
    for query in ("", "?pipeline=combo&top_k=2"):
        prediction = client.post(f"/predict{query}", headers=KEY, files={"image": jpeg}, data=fields).json()
        assert prediction["pipeline"] == "combo" and len(prediction["pills"]) == 2 and prediction["annotated"]
        assert {len(pill["candidates"]) for pill in prediction["pills"]} == {2}
    answers = client.post("/batch", headers=KEY, files={"images": jpeg}, data={"pipeline": "combo"}).json()["answers"]
    assert [len(item["prediction"]["pills"]) for item in answers] == [2]


def test_unknown_files_and_parameters_are_refused_on_every_endpoint(client: TestClient, jpeg: bytes) -> None:
    for address in ("/health", "/ready", "/version", "/classes", "/metrics"):
        check_error(client.get(f"{address}?pipeline=combo", headers=KEY), 422, "it takes none")
        assert client.get(address, headers=KEY).status_code == 200
    check_error(client.post("/batch", headers=KEY, files=[("images", jpeg), ("image", jpeg)]), 422, "images")
    check_error(client.post("/predict", headers=KEY, files={"imgae": jpeg}), 422, "did you mean image?")
    check_error(client.post("/predict", headers=KEY, data={"image": "a.jpg"}, files={"pipeline": jpeg}), 422, "text")
    admin = {"X-Admin-Key": "Qm3-vT8yLs_w5Kd0XzRa"}
    check_error(client.post("/reload?folder=second", headers=admin), 422, "folder")
    for page in ("/", "/page.css", "/docs", "/openapi.json"):
        assert client.get(f"{page}?version=2").status_code == 200, "pages and files ignore a query"


def test_a_misspelt_field_of_reload_does_not_open_the_same_models_again(models: Path) -> None:
    with client_for(models, admin_keys=("Qm3-vT8yLs_w5Kd0XzRa",)) as opened:
        admin = {"X-Admin-Key": "Qm3-vT8yLs_w5Kd0XzRa"}
        check_error(opened.post("/reload", headers=admin, json={"foldr": "second"}), 422, "did you mean folder?")
        assert opened.post("/reload", headers=admin, json={}).status_code == 200


def test_head_is_a_get_without_a_body(client: TestClient, tmp_path: Path) -> None:
    for address in ("/health", "/ready", "/", "/version", "/classes", "/docs", "/openapi.json"):
        whole, head = client.get(address, headers=KEY), client.head(address, headers=KEY)
        assert (head.status_code, head.content) == (200, b""), address
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert abs(int(head.headers["content-length"]) - len(whole.content)) < 8, "the seconds of /health may differ"
    assert client_for(tmp_path).head("/ready").status_code == 503
    assert client.head("/version").status_code == 401 and client.head("/predict").status_code == 405
    text = client.get("/metrics", headers=KEY).text
    assert 'pillsnap_requests_total{route="/ready",status="200"}' in text


def test_cors_allows_only_listed_origins(client: TestClient) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-API-Key"}
    allowed = client.options("/predict", headers=preflight | {"Origin": "https://pillsnap.co.kr"})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://pillsnap.co.kr"
    other = client.options("/predict", headers=preflight | {"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in other.headers


def test_starts_anywhere_without_training_packages(tmp_path: Path) -> None:
    check = (
        "import sys\nimport pillsnap.serve\nassert pillsnap.serve.app.title == 'pillsnap'\n"
        "print(sorted({'torch', 'timm', 'ultralytics', 'matplotlib', 'celery', 'redis', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
