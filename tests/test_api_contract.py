"""The service against its OpenAPI schema: no request causes a server error, and every response matches the schema."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ADMIN, Running, running
from tiny_models import KEY, save_classifier, save_detector, save_quality, save_segmenter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder)
    save_detector(folder)
    save_quality(folder)
    save_segmenter(folder)
    with running(folder, tmp_path_factory.mktemp("server")) as opened:
        yield opened


def test_no_request_causes_a_server_error(server: Running, tmp_path: Path) -> None:
    """schemathesis generates requests from the schema: valid ones, invalid ones, and chains of them."""
    keys = [word for header in (f"X-API-Key: {KEY['X-API-Key']}", f"X-Admin-Key: {ADMIN}") for word in ("-H", header)]
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{server.url}/openapi.json",
        *keys,
        "--checks",
        "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance",
        "--max-examples",
        "40",
        "--generation-deterministic",
        "--no-color",
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
    ]
    schema = httpx.get(f"{server.url}/openapi.json").json()
    operations = sum(len(methods) for methods in schema["paths"].values())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and f"Tested: {operations}" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in server.log.read_text(encoding="utf-8")
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_the_openapi_schema_has_examples_and_the_form(server: Running) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/health", "/ready", "/version", "/classes", "/metrics", "/predict", "/search", "/batch", "/reload"} <= set(
        schema["paths"]
    )
    form = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image"] and form["properties"]["image"]["format"] == "binary"
    assert schema["components"]["schemas"]["PillResponse"]["properties"]["code"]["examples"] == ["K-000030"]
    assert schema["components"]["schemas"]["ErrorResponse"]["required"] == ["detail", "code", "request_id"]
