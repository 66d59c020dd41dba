"""A handful against the drugs that are expected: in the service, the client and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tiny_models import CONFIG, FOUND, KEY, RIGHT, photo_jpeg, save_classifier, save_detector

from pillsnap import cli
from pillsnap.answer.classes import Drug
from pillsnap.answer.gallery.recognise import network_of, open_identifier, with_gallery
from pillsnap.answer.gallery.references import Gallery, Reference
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.runtime.images import decode_image
from pillsnap.serve import create_app
from pillsnap.service.prescriptions import classify_expected

WHITE, RED, BLUE = "K-000030", "K-000007", "K-000101"  # the photo has a white and a red pill


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[TestClient]:
    settings = load_settings(CONFIG, ["serve.requests_per_minute=0"])
    with TestClient(create_app(settings, Environment((RIGHT,), model_path=models))) as opened:
        yield opened


def answer(client: TestClient, expected: str, pipeline: str = "combo") -> dict[str, Any]:
    """The response for the photo of two pills."""
    response = client.post(
        "/predict",
        params={"pipeline": pipeline},
        headers=KEY,
        files={"image": photo_jpeg()},
        data={"expected": expected},
    )
    assert response.status_code == 200, response.text
    return response.json()


def summary(prescription: dict[str, Any]) -> tuple[list[str], list[str], list[int], list[int]]:
    """Codes that are matched and missing, places of the surplus and the doubtful pills."""
    return (
        [one["code"] for one in prescription["matched"]],
        [drug["code"] for drug in prescription["missing"]],
        prescription["surplus"],
        [one["pill"] for one in prescription["doubtful"]],
    )


@pytest.mark.parametrize(
    "expected, said",
    [
        (f"{WHITE},{RED}", ([WHITE, RED], [], [], [])),
        (f"{RED};k-30", ([WHITE, RED], [], [], [])),
        ("649900030, 641600011", ([WHITE, RED], [], [], [])),  # by EDI codes
        (f"{WHITE},{RED},{BLUE}", ([WHITE, RED], [BLUE], [], [])),
        (WHITE, ([WHITE], [], [1], [])),
        (f"{WHITE},{BLUE}", ([WHITE], [BLUE], [1], [])),
        (f"{WHITE}*2,{RED}", ([WHITE, RED], [WHITE], [], [])),
        (BLUE, ([], [BLUE], [0, 1], [])),
    ],
)
def test_what_is_there_and_what_is_not(client: TestClient, expected: str, said: tuple[list[str], ...]) -> None:
    found = answer(client, expected)
    assert summary(found["prescription"]) == said
    assert found["prescription"]["complete"] is (said[1:] == ([], [], []))
    assert [pill["code"] for pill in found["pills"]] == [WHITE, RED], "nothing is bent into an expected drug"
    assert all(pill["verdict"] == "identified" and len(pill["candidates"]) == 3 for pill in found["pills"])


@pytest.mark.parametrize(
    "expected, note",
    [
        (f"{WHITE},K-999999", "No drug of this model"),
        (f"{WHITE},{WHITE}", "more than once"),
        ("K-999999", "No drug of this model"),
        (" , ", "is empty"),
        ("", "is empty"),
        ("K" * 30_000, "30,000 characters"),
        (f"<b>{WHITE}</b>", "No drug of this model"),
    ],
)
def test_an_odd_list_is_one_sentence_and_the_rest_goes_on(client: TestClient, expected: str, note: str) -> None:
    found = answer(client, expected)
    assert len([text for text in found["notes"] if note in text]) == 1 and len(found["pills"]) == 2
    assert found.get("prescription") is None or not found["prescription"]["complete"]


def test_two_pills_in_one_box_are_told_apart(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = client.app.state.service.loaded().identifier
    (x1, y1), (x2, y2) = (np.min(FOUND[:2, :2] - FOUND[:2, 2:4] / 2, 0), np.max(FOUND[:2, :2] + FOUND[:2, 2:4] / 2, 0))
    together = np.array([[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.9]], np.float32)

    def detect(batch: np.ndarray) -> np.ndarray:
        scale = batch.shape[-1] / 320
        return ((together if scale == 1 else FOUND) * [scale, scale, scale, scale, 1]).T[None].astype(np.float32)

    monkeypatch.setattr(identifier, "detect", detect)
    assert summary(answer(client, f"{WHITE},{RED}")["prescription"]) == ([WHITE, RED], [], [], [])
    assert summary(answer(client, WHITE)["prescription"]) == ([WHITE], [], [1], [])
    response = client.post("/predict?pipeline=combo", headers=KEY, files={"image": photo_jpeg()}).json()
    assert len(response["pills"]) == 1, "without a list nobody looks twice"


def test_a_pill_that_looks_like_no_drug_is_matched_with_none(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    identifier = client.app.state.service.loaded().identifier
    strict = Verdicts(identified=1e9, known=1e9)  # every pill is unknown
    monkeypatch.setattr(identifier, "rules", replace(identifier.rules, verdicts=strict))
    found = answer(client, f"{WHITE},{RED}")
    assert [pill["verdict"] for pill in found["pills"]] == ["unknown", "unknown"]
    assert summary(found["prescription"]) == ([], [], [], [0, 1]) and not found["prescription"]["complete"]
    said = [[drug["code"] for drug in one["drugs"]] for one in found["prescription"]["doubtful"]]
    assert said == [[WHITE], [RED]], "a person decides"


def test_an_enrolled_drug_is_expected_by_its_code(tmp_path: Path) -> None:
    save_detector(tmp_path)
    save_classifier(tmp_path, embeddings=True)
    identifier = open_identifier(tmp_path)
    seen = identifier.identify(decode_image(photo_jpeg()), "combo")
    identifier.with_embeddings = True
    crops = identifier.cropper.crop_pills(decode_image(photo_jpeg()), "combo")
    new = Reference(("G-1",), "", identifier.embed(crops.crops[:1])[0], b"", "photo")
    gallery = Gallery(network_of(identifier), {}, ()).added([Drug("G-1", "Enrolled")], [new])
    together = with_gallery(identifier, gallery)
    compared = classify_expected(together, crops, 3, f"G-1,{seen.pills[1].code}")[1]
    assert compared is not None and compared["unknown"] == [], "it is a drug that can be named"
    said = [one["code"] for one in compared["matched"]], [one["code"] for one in compared["missing"]]
    assert said == (["G-1", seen.pills[1].code], []), compared
    other = classify_expected(identifier, crops, 3, "G-1,K-000030")[1]
    assert other is not None and other["unknown"] == ["G-1"]


def test_without_a_list_nothing_is_said(client: TestClient) -> None:
    response = client.post("/predict?top_k=2", headers=KEY, files={"image": photo_jpeg()}).json()
    assert "prescription" not in response and len(response["pills"][0]["candidates"]) == 2


def test_each_photo_of_a_batch_is_compared(client: TestClient) -> None:
    photos = [("images", photo_jpeg()), ("images", photo_jpeg())]
    answers = client.post(f"/batch?pipeline=combo&expected={WHITE},{RED}", headers=KEY, files=photos).json()["answers"]
    assert [one["prescription"]["complete"] for one in (item["prediction"] for item in answers)] == [True, True]


def test_the_command_takes_a_list_and_a_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(photo_jpeg())
    (tmp_path / "order.csv").write_bytes(f"번호,코드\n1,{WHITE}\n2,{BLUE}\n".encode("cp949"))
    command = ["predict", "photo.jpg", "--model", str(models), "--pipeline", "combo"]
    assert cli.main([*command, "--expected", f"{WHITE},{RED}"]) == 0
    assert "Prescription complete: 2 matched." in capsys.readouterr().out
    assert cli.main([*command, "--expected", "order.csv"]) == 0
    said = capsys.readouterr().out
    assert f"1 matched; missing {BLUE} Blue tablet; surplus pill 2." in said and "names its columns" in said
    (tmp_path / "order.csv").rename("ward 3, monday.csv")
    assert cli.main([*command, "--expected", "ward 3, monday.csv"]) == 0
    assert "1 matched" in capsys.readouterr().out, "a file, whatever its name"
    assert cli.main([*command, "--expected", "order.csv"]) == 2
    assert "there is no file order.csv" in capsys.readouterr().err
    assert cli.main([*command, "--expected", f"code\tdose\n{WHITE}\t0.5 mg/day"]) == 0, "an order, not the name of one"
    assert "1 matched" in capsys.readouterr().out
    assert cli.main([*command, "--expected", WHITE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prescription"]["surplus"] == [1]
