"""Pills of the sample are read, doubtful ones are ranked, and without rapidocr the rest goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tiny_models import CONFIG, KEY, RIGHT, photo_jpeg, save_classifier

from pillsnap.answer.classes import Drug
from pillsnap.answer.crops import crop_pill
from pillsnap.answer.factory import load_identifier
from pillsnap.answer.gallery.enroll import NamedPhoto, enrolled
from pillsnap.answer.gallery.gallery_file import GALLERY_FILE, read_gallery, write_gallery
from pillsnap.answer.gallery.recognise import network_of, with_gallery
from pillsnap.answer.gallery.references import Gallery
from pillsnap.answer.imprint.joining import Reading
from pillsnap.answer.imprint.ranking import ImprintRanking
from pillsnap.answer.imprint.reader import ImprintReader, ImprintUnavailable, _reader, open_reader
from pillsnap.answer.imprint.setting import read_imprints
from pillsnap.answer.search.appearance import read_imprint
from pillsnap.answer.search.imprints import plain
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.config.schema import SettingsError
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.images import decode_image
from pillsnap.sample.plan import plan_sample
from pillsnap.sample.write import draw_photo
from pillsnap.serve import create_app
from pillsnap.service.client.table import as_table


class Says(ImprintReader):
    """Reads the same on every pill, and counts."""

    def __init__(self, reading: Reading | None) -> None:
        self.reading, self.calls = reading, 0

    def __call__(self, crop: np.ndarray) -> Reading | None:
        assert crop.shape == (256, 256, 3), "letters need more pixels than the classifier"
        self.calls += 1
        return self.reading


@pytest.fixture
def without_rapidocr(monkeypatch: pytest.MonkeyPatch) -> None:
    _reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)


def service(models: Path, *words: str) -> TestClient:
    settings = load_settings(CONFIG, ["serve.requests_per_minute=0", *words])
    return TestClient(create_app(settings, Environment((RIGHT,), model_path=models)))


def pills(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    """The pills of the photo of two."""
    response = client.post(
        "/predict", params={"pipeline": "combo", **query}, headers=KEY, files={"image": photo_jpeg()}
    )
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["pills"]
    return found


@pytest.fixture
def client(models: Path) -> Iterator[TestClient]:
    with service(models, "identify.imprint=off") as opened:
        yield opened


def doubting(client: TestClient, reader: ImprintReader | None, labels: dict[str, str]) -> None:
    """Identify no pill, let a reader read them, and give drugs an imprint."""
    identifier = client.app.state.service.loaded().identifier
    object.__setattr__(identifier.rules, "verdicts", Verdicts())
    drugs = list(identifier.rules.class_map)
    for drug in drugs:
        drug.attributes["print_front"] = labels.get(drug.code, "")
    identifier.refine = None if reader is None else ImprintRanking(reader, drugs)


def test_without_rapidocr_one_sentence_says_so_and_the_rest_goes_on(
    models: Path, without_rapidocr: None, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(ImprintUnavailable) as caught:
        open_reader()
    assert "pillsnap[imprint]" in str(caught.value) and str(caught.value).count("\n") == 0
    with caplog.at_level(logging.INFO, "pillsnap"):
        identifier = read_imprints(load_identifier(models), "auto")
    assert identifier.refine is None and "rapidocr is not installed" in caplog.text
    with service(models, "identify.imprint=auto") as opened:
        assert [pill["imprint"] for pill in pills(opened)] == [None, None]


def test_the_setting_is_checked():
    with pytest.raises(SettingsError, match="identify.imprint"):
        load_settings(CONFIG, ["identify.imprint=always"])


def test_a_sure_pill_is_not_read(client: TestClient):
    reader = Says(Reading("K20", 0.99))
    identifier = client.app.state.service.loaded().identifier
    identifier.refine = ImprintRanking(reader, list(identifier.rules.class_map))
    found = pills(client)
    assert [pill["imprint"] for pill in found if pill["verdict"] == "identified"] == [None] * sum(
        pill["verdict"] == "identified" for pill in found
    )
    assert reader.calls == sum(pill["verdict"] != "identified" for pill in found)


def test_what_is_read_puts_the_candidates_of_a_doubtful_pill_in_order(client: TestClient):
    identifier = client.app.state.service.loaded().identifier
    classify = identifier.classify
    identifier.classify = lambda crops: np.asarray(classify(crops)) / 10  # as likely as each other, nearly
    doubting(client, None, {})
    before = pills(client, top_k=3)
    second = [pill["candidates"][1]["code"] for pill in before]
    labels = dict.fromkeys(("K-000007", "K-000030", "K-000101"), "XYZ") | {second[0]: "K분할선20"}
    doubting(client, Says(Reading("K20", 0.99)), labels)
    after = pills(client, top_k=3)
    assert {pill["imprint"] for pill in after} == {"K20"} and not any(pill["verdict"] == "identified" for pill in after)
    places = [[pill["candidates"] for pill in found][0] for found in (before, after)]
    ranks = [[one["code"] for one in candidates].index(second[0]) for candidates in places]
    assert ranks == [1, 0]
    # What the model holds for likely is told as it was.
    told = [{one["code"]: one["confidence"] for one in candidates} for candidates in places]
    assert told[0] == pytest.approx(told[1])


def test_an_enrolled_pill_is_read_once_and_kept(tmp_path: Path):
    save_classifier(tmp_path, embeddings=True)
    reader, identifier = Says(Reading("K20", 0.99)), load_identifier(tmp_path)
    ranking = ImprintRanking(reader, list(identifier.rules.class_map))
    identifier.refine, identifier.read_imprint = ranking, ranking.read
    photos = [NamedPhoto("front.jpg", photo_jpeg())]
    gallery = enrolled(Gallery(network_of(identifier), {}, ()), identifier, Drug("G-1", "new"), photos, whole=True)
    write_gallery(gallery, tmp_path / GALLERY_FILE)
    kept = read_gallery(tmp_path / GALLERY_FILE)
    assert [item.imprint for item in kept.references] == ["K20"] and reader.calls == 1
    opened = with_gallery(identifier, kept)
    assert opened.identify(decode_image(photo_jpeg()), "single").pills[0].matches[0].imprint == "K20"
    assert reader.calls <= 2, "the pill that is asked, if it is doubtful, and no reference again"


def test_nothing_legible_changes_nothing(client: TestClient):
    doubting(client, None, {"K-000030": "K20"})
    before = pills(client)
    doubting(client, Says(None), {"K-000030": "K20"})
    after = pills(client)
    assert [pill["candidates"] for pill in after] == [pill["candidates"] for pill in before]
    assert {pill["imprint"] for pill in after} == {""}


def test_the_table_says_what_was_read(client: TestClient):
    doubting(client, Says(Reading("K 20", 0.99)), {})
    response = client.post("/predict?pipeline=combo", headers=KEY, files={"image": photo_jpeg()}).json()
    assert "pill 1 reads K 20" in as_table([(Path("a.jpg"), response)]) and response["timings_ms"]["imprint"] >= 0


def test_pills_of_the_sample_are_read():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed, so no pill can be read")
    reader, seen, right = open_reader(1), {True: 0, False: 0}, {True: 0, False: 0}
    for photo in plan_sample()[5::67]:
        said = plain(read_imprint(photo.drugs[0].prints[photo.side])[0] or "") if photo.single else ""
        if not said:
            continue
        image, (box,) = draw_photo(photo)
        x, y, width, height = box
        reading = reader(crop_pill(image, Box(x, y, x + width, y + height)))
        printed = photo.drugs[0].shape == "capsule"
        seen[printed] += 1
        right[printed] += reading is not None and plain(reading.text) == said
    assert seen[True] >= 2 and seen[False] >= 12
    assert right[True] >= 0.5 * seen[True] and right[False] >= 0.6 * seen[False]
