"""Front and back of one pill: the service, the Python client and the command give one answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from fastapi.testclient import TestClient
from PIL import Image
from tiny_models import COLOURS, CONFIG, KEY, RIGHT, save_classifier, save_detector

from pillsnap import cli
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.serve import create_app

RED, WHITE, BLUE = COLOURS


def photo_of(colour: np.ndarray) -> bytes:
    """A pill that fills its photo."""
    buffer = io.BytesIO()
    pixels = np.broadcast_to((255 * colour).round().astype(np.uint8), (80, 80, 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models without a detector, which identify what is clear."""
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=Verdicts(identified=3.0, alike=0.1)))
    save_classifier(tmp_path)
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    """The service with these models."""
    environment = Environment(api_keys=(RIGHT,), model_path=folder)
    with TestClient(create_app(load_settings(CONFIG, ["serve.requests_per_minute=0"]), environment)) as opened:
        yield opened


def test_a_clear_back_decides(client: TestClient) -> None:
    torn = photo_of((RED + WHITE) / 2)
    alone = client.post("/predict", headers=KEY, files={"image": torn}).json()["pills"][0]
    assert alone["verdict"] == "ambiguous" and alone["alike"] == 2
    for back, name in ((RED, "Red capsule"), (WHITE, "White round tablet")):
        files = {"image": torn, "image_back": photo_of(back)}
        answer = client.post("/predict", headers=KEY, files=files, params={"top_k": 2}).json()
        pill = answer["pills"][0]
        assert len(answer["pills"]) == 1 and pill["verdict"] == "identified" and pill["name"] == name
        assert len(pill["candidates"]) == 2 and len(answer["notes"]) == 1
    files = {"image": photo_of(RED), "image_back": photo_of(BLUE)}
    pill = client.post("/predict", headers=KEY, files=files).json()["pills"][0]
    assert pill["verdict"] == "ambiguous", "the sides contradict each other"


def test_a_back_that_does_not_fit_is_one_sentence(client: TestClient) -> None:
    both = {"image": photo_of(RED), "image_back": photo_of(RED)}
    for fields, files, status, code in (
        ({"pipeline": "combo"}, both, 422, "back_of_several"),
        ({"expected": "K-000007"}, both, 422, "back_of_several"),
        ({}, {"image": photo_of(RED), "image_back": b"no photo"}, 415, "not_an_image"),
        ({"image_back": "text"}, {"image": photo_of(RED)}, 422, "invalid_parameter"),
        ({}, {"image_back": photo_of(RED)}, 422, "photo_missing"),
        ({}, [("image", photo_of(RED)), ("image", photo_of(RED))], 422, "form_damaged"),
    ):
        answer = client.post("/predict", headers=KEY, data=fields, files=files)
        assert answer.status_code == status and answer.json()["code"] == code, (fields, answer.text)


def test_a_side_without_a_pill_is_left_out(folder: Path) -> None:
    save_detector(folder)
    environment = Environment(api_keys=(RIGHT,), model_path=folder)
    with TestClient(create_app(load_settings(CONFIG, ["serve.requests_per_minute=0"]), environment)) as client:
        files = {"image": tiny_models.photo_jpeg(), "image_back": tiny_models.photo_jpeg()}
        one = client.post("/predict", headers=KEY, files={"image": files["image"]}).json()["pills"][0]
        two = client.post("/predict", headers=KEY, files=files, params={"conf_threshold": 0.93}).json()["pills"][0]
        nothing = client.post("/predict", headers=KEY, files=files, params={"conf_threshold": 0.99}).json()["pills"][0]
    assert one["verdict"] == two["verdict"] == "identified" and one["code"] == two["code"] and one["box"] == two["box"]
    assert nothing["verdict"] == "no_pill"


def test_the_command_takes_a_back(folder: Path, capsys: pytest.CaptureFixture) -> None:
    front, back = folder / "front.png", folder / "back.png"
    front.write_bytes(photo_of((RED + WHITE) / 2))
    back.write_bytes(photo_of(RED))
    words = ["predict", str(front), "--model", str(folder)]
    assert cli.main([*words, "--json", "--back", str(back)]) == 0
    assert json.loads(capsys.readouterr().out)["pills"][0]["verdict"] == "identified"
    assert cli.main([*words, "--back", str(back), "--pipeline", "combo"]) == 2
    assert "--back is the other side of one pill" in capsys.readouterr().err
