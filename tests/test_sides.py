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
FIELDS = ("image", "image_back")


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
        assert len(pill["candidates"]) == 2 and sum("no detector" in note for note in answer["notes"]) == 1
    files = {"image": photo_of(RED), "image_back": photo_of(BLUE)}
    pill = client.post("/predict", headers=KEY, files=files).json()["pills"][0]
    assert pill["verdict"] == "ambiguous" and pill["reason"]["reason"] == "sides_disagree"
    assert "front and back" in pill["reason"]["en"] and "앞면" in pill["reason"]["ko"]


def test_two_sides_are_no_more_certain_than_one(client: TestClient) -> None:
    def ask(*sides: float) -> dict:
        files = [(field, photo_of(share * RED + (1 - share) * WHITE)) for field, share in zip(FIELDS, sides)]
        return client.post("/predict", headers=KEY, files=files).json()["pills"][0]

    one, less, twice, both = ask(0.54), ask(0.52), ask(0.54, 0.54), ask(0.52, 0.54)
    assert 0.5 < less["confidence"] < one["confidence"] < 0.95
    for pill in (twice, both):
        assert pill["code"] == one["code"] and pill["confidence"] == pytest.approx(one["confidence"], abs=1e-4)
    assert ask(0.54, 0.46)["confidence"] < less["confidence"], "less certain where the sides disagree"


def test_photos_of_one_side_are_averaged(client: TestClient) -> None:
    torn, red = photo_of((RED + WHITE) / 2), photo_of(RED)

    def ask(*files: tuple[str, bytes]) -> dict:
        answer = client.post("/predict", headers=KEY, files=list(files))
        assert answer.status_code == 200, answer.text
        return answer.json()["pills"][0]

    alone = ask(("image", torn))
    assert alone["verdict"] == "ambiguous" and alone["reason"]["reason"] == "look_alikes"
    more = ask(("image", torn), ("image_more", red), ("image_more", red))
    assert more["verdict"] == "identified" and more["name"] == "Red capsule" and more["reason"] is None
    clear = ask(("image", red))
    assert alone["confidence"] < more["confidence"] < clear["confidence"], "an average, not more evidence"
    assert ask(("image", red), ("image_more", red))["confidence"] == pytest.approx(clear["confidence"], abs=1e-5)
    every = ask(("image", torn), ("image_more", red), ("image_back", red), ("image_back", red))
    assert every["name"] == "Red capsule" and every["verdict"] == "identified"


def test_a_back_that_does_not_fit_is_one_sentence(client: TestClient) -> None:
    red = photo_of(RED)
    both = {"image": red, "image_back": red}
    for fields, files, status, code in (
        ({"pipeline": "combo"}, both, 422, "several_photos_of_several_pills"),
        ({"expected": "K-000007"}, both, 422, "several_photos_of_several_pills"),
        ({"pipeline": "combo"}, [("image", red), ("image_more", red)], 422, "several_photos_of_several_pills"),
        ({}, [("image", red), *[("image_more", red)] * 4], 422, "invalid_parameter"),
        ({}, [("image", red), *[("image_back", red)] * 5], 422, "invalid_parameter"),
        ({}, {"image": photo_of(RED), "image_back": b"no photo"}, 415, "not_an_image"),
        ({"image_back": "text"}, {"image": photo_of(RED)}, 422, "invalid_parameter"),
        ({}, {"image_back": photo_of(RED)}, 422, "photo_missing"),
        ({}, [("image", photo_of(RED)), ("image", photo_of(RED))], 422, "form_damaged"),
    ):
        answer = client.post("/predict", headers=KEY, data=fields, files=files)
        assert answer.status_code == status and answer.json()["code"] == code, (fields, answer.text)
        assert code != "not_an_image" or "The photo in image_back is not a picture" in answer.json()["detail"]


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
    assert cli.main([*words, "--json", "--more", str(back), "--more", str(back)]) == 0
    assert json.loads(capsys.readouterr().out)["pills"][0]["name"] == "Red capsule"
    assert cli.main([*words, "--back", str(back), "--pipeline", "combo"]) == 2
    assert "--back show the same pill as one photo" in capsys.readouterr().err
    assert cli.main([*words, *["--back", str(back)] * 5]) == 2
    assert "--back takes at most 4 photos, not 5" in capsys.readouterr().err
    (folder / "torn.png").write_bytes(b"no photo")
    for name, reason in (("torn.png", "torn.png is not a picture"), ("gone.png", "gone.png can't be read")):
        assert cli.main([*words, "--back", str(folder / name)]) == 1
        assert reason in capsys.readouterr().err
