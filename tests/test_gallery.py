"""The gallery from end to end: command line, service, archive, store and export; bad input changes nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image
from tiny_models import CONFIG, KEY, RIGHT, check_error, photo_jpeg, save_classifier, save_detector

from pillsnap import cli
from pillsnap.answer.classes import Drug
from pillsnap.answer.gallery.enroll import make_reference
from pillsnap.answer.gallery.gallery_file import GALLERY_FILE, read_gallery, write_gallery
from pillsnap.answer.gallery.recognise import GalleryIdentifier, open_identifier
from pillsnap.answer.gallery.references import Gallery, Reference
from pillsnap.answer.verdicts.verdicts import Verdicts
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.data.moved import dataset_of_run
from pillsnap.evaluation.references import chosen_rows
from pillsnap.export.report import export_run
from pillsnap.packaging.archive import make_archive, restore_archive
from pillsnap.registry.release import pull_models, push_run
from pillsnap.registry.store import open_store
from pillsnap.registry.versions import promote
from pillsnap.serve import create_app
from pillsnap.service.inference.model_manager import load

GREEN, VIOLET = (40, 160, 60), (140, 60, 160)
ADMIN = "q7Wm2-Lk0vR_t8Yc5n-admin"


def plain_photo(colour: tuple[int, int, int]) -> bytes:
    """A pill that fills its photo."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((80, 80, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models with embeddings, and photos of two drugs."""
    save_classifier(tmp_path, embeddings=True)
    for name, colour in {"Green": GREEN, "Violet": VIOLET}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "front.png").write_bytes(plain_photo(colour))
    return tmp_path


@pytest.fixture
def command(folder: Path, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `pillsnap gallery` on the models: status, output and error stream."""

    def run(what: str, *words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main(["gallery", what, "--model", str(folder), *map(str, words)])
        return status, *capfd.readouterr()

    return run


def test_drugs_are_enrolled_listed_checked_and_removed(folder: Path, command: Callable):
    assert command("enroll", folder / "photos", "--whole")[0] == 0
    before = read_gallery(folder / GALLERY_FILE)
    assert sorted(drug.name for drug in before.drugs.values()) == ["Green", "Violet"]
    (folder / "white.png").write_bytes(plain_photo((240, 240, 240)))
    status, out, _ = command("enroll", "--name", "White", "--code", "W-1", "--whole", folder / "white.png")
    after = read_gallery(folder / GALLERY_FILE)
    assert status == 0 and json.loads(out)["drugs"] == 3 and json.loads(out)["added"] == 1
    again = json.loads(command("enroll", "--name", "White", "--code", "W-1", "--whole", folder / "white.png")[1])
    assert again["added"] == 0 and again["hash"] == json.loads(out)["hash"]
    for old, new in zip(before.references, after.references):
        assert old.photo == new.photo and np.array_equal(old.embedding, new.embedding), "other drugs never change"
    assert "W-1  White  (1 unknown)" in command("list")[1] and "Green  (1 front)" in command("list")[1]
    checked = json.loads(command("check")[1])
    assert checked["references"] == 3 and len(checked["without_both_sides"]) == 3
    pill = open_identifier(folder).identify(np.full((80, 80, 3), GREEN, np.uint8), "single").pills[0]
    assert pill.matches[0].drugs[0].name == "Green" and pill.matches[0].side == "front" and len(pill.matches) == 3
    assert command("remove", "W-1")[0] == 0 and "White" not in command("list")[1]


def test_galleries_are_merged(folder: Path, command: Callable, tmp_path: Path):
    command("enroll", "--name", "Green", "--whole", folder / "photos" / "Green")
    shutil.move(folder / GALLERY_FILE, tmp_path / "other.npz")
    command("enroll", "--name", "Violet", "--whole", folder / "photos" / "Violet")
    status, out, _ = command("merge", tmp_path / "other.npz")
    assert status == 0 and json.loads(out)["drugs"] == 2
    assert {drug.name for drug in read_gallery(folder / GALLERY_FILE).drugs.values()} == {"Green", "Violet"}


def test_merging_a_photo_of_another_drug_is_a_decision(folder: Path, command: Callable, tmp_path: Path):
    photo = folder / "photos" / "Green" / "front.png"
    command("enroll", "--name", "Green", "--code", "G", "--whole", photo)
    shutil.move(folder / GALLERY_FILE, tmp_path / "other.npz")
    command("enroll", "--name", "Generic green", "--code", "H", "--whole", photo)
    before = (folder / GALLERY_FILE).read_bytes()
    status, _, err = command("merge", tmp_path / "other.npz")
    assert status == 2 and "The same photo is given for G and for H" in err and "--same" in err
    assert (folder / GALLERY_FILE).read_bytes() == before
    assert command("merge", "--same", tmp_path / "other.npz")[0] == 0
    assert [item.codes for item in read_gallery(folder / GALLERY_FILE).references] == [("G", "H")]


def test_folders_of_one_name_are_one_drug(folder: Path, command: Callable):
    more = folder / "more" / "Green"
    more.mkdir(parents=True)
    (more / "back.png").write_bytes(plain_photo((42, 158, 61)))
    assert command("enroll", folder / "photos", folder / "more", "--whole")[0] == 0
    listed = command("list")[1]
    assert "Green  (1 front, 1 back)" in listed and "Violet  (1 front)" in listed
    status, _, err = command("enroll", folder / "photos", more / "back.png", "--whole")
    assert status == 2 and "back.png has no folder with the name of its drug" in err


def test_drugs_that_look_the_same_are_one_appearance(folder: Path, command: Callable):
    photo = folder / "photos" / "Green" / "front.png"
    command("enroll", "--name", "Green", "--code", "G", "--whole", photo)
    status, _, err = command("enroll", "--name", "Generic green", "--code", "H", "--whole", photo)
    assert status == 2 and "The same photo is given for H and for G" in err and err.count("pillsnap: ") == 1
    assert command("enroll", "--name", "Generic green", "--code", "H", "--whole", "--same", photo)[0] == 0
    assert json.loads(command("check")[1])["appearances"] == 1
    pill = open_identifier(folder).identify(np.full((80, 80, 3), GREEN, np.uint8), "single").pills[0]
    assert [drug.code for drug in pill.matches[0].drugs] == ["G", "H"] and len(pill.matches) == 1


def test_bad_input_is_one_sentence_and_changes_nothing(folder: Path, command: Callable, tmp_path: Path):
    green = folder / "photos" / "Green" / "front.png"
    command("enroll", "--name", "Green", "--whole", green)
    foreign = Gallery("another network", {"X": Drug("X", "X")}, (Reference(("X",), "", np.ones(3), b"", "1"),))
    write_gallery(foreign, tmp_path / "foreign.npz")
    (tmp_path / "no.png").write_bytes(b"no photo")
    (tmp_path / "two.jpg").write_bytes(photo_jpeg())
    torn, loose = tmp_path / "torn" / "Red", tmp_path / "loose" / "Red"
    for drug in (torn, loose):
        drug.mkdir(parents=True)
        (drug / "front.png").write_bytes(green.read_bytes() + b"another photo")
    (torn / "empty.jpg").touch()
    (loose.parent / "stray").write_bytes(green.read_bytes())  # a photo by its content
    (loose / ".cache").mkdir()
    before = (folder / GALLERY_FILE).read_bytes()
    attempts = {
        ("enroll", "--name", "<script>alert(1)</script>", "--whole", green): "has markup",
        ("enroll", "--name", "Red", "--whole", tmp_path / "no.png"): "no.png",
        ("enroll", "--name", "Red", "--whole", tmp_path / "missing.png"): "missing.png can't be read",
        ("enroll", "--whole", torn.parent): "empty.jpg can't be enrolled",
        ("enroll", "--name", "Red", "--whole", torn): "empty.jpg can't be enrolled",
        ("enroll", "--whole", loose.parent): "stray is in no folder with the name of its drug",
        ("enroll", "--whole", "--code", "K-5", folder / "photos"): "--code is the code of one drug",
        ("build", "--per-side", "0"): "--per-side is 0",
        ("list", "Green"): "gallery list shows all drugs",
        ("enroll", "--name", "Red", tmp_path / "two.jpg"): "There is no detector",
        ("enroll", "--name", "Red", "--code", "../x", "--whole", green): "no code of a drug",
        ("enroll", green): "the drug has no name",
        ("enroll", "--name", "Red"): "There is no photo of Red",
        ("merge", tmp_path / "foreign.npz"): "different networks",
        ("merge", tmp_path / "no.png"): "is damaged",
        ("remove", "Z-1"): "has no drug Z-1",
        ("remove",): "no drug to remove",
    }
    for words, message in attempts.items():
        status, _, err = command(*words)
        assert status == 2 and message in err and err.count("pillsnap: ") == 1 and "Traceback" not in err, (words, err)
        assert (folder / GALLERY_FILE).read_bytes() == before, words
    assert not list(folder.glob(".gallery.????????.npz")), "nothing half-written is left"
    save_detector(folder)
    status, _, err = command("enroll", "--name", "Red", tmp_path / "two.jpg")
    assert status == 2 and "Several pills were found in two.jpg" in err
    write_gallery(Gallery("classifier of 8", {}, ()), folder / GALLERY_FILE)
    status, _, err = command("list")
    assert status == 2 and "is empty" in err


def test_a_photo_without_a_pill_is_refused(folder: Path, command: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, box_confidence=0.99))
    save_classifier(folder, embeddings=True)
    save_detector(folder)
    (folder / "table.jpg").write_bytes(photo_jpeg())
    status, _, err = command("enroll", "--name", "Red", folder / "table.jpg")
    assert status == 2 and "No pill was found in table.jpg" in err and err.count("pillsnap: ") == 1
    assert not (folder / GALLERY_FILE).exists()


def test_bad_input_to_the_service_changes_nothing(folder: Path):
    save_detector(folder)
    with service(folder) as client:
        green, admin = plain_photo(GREEN), {"X-Admin-Key": ADMIN}

        def enroll(photo: bytes, **fields: str) -> Response:
            files = [("images", ("front.png", photo))]
            return client.post("/gallery", headers=admin, data={"whole": "true"} | fields, files=files)

        assert enroll(green, name="Green").status_code == 200
        before = (folder / GALLERY_FILE).read_bytes()
        for photo, fields, message in (
            (green, {"name": "Generic green"}, "The same photo is given for"),
            (green, {"name": "<b>Green</b>"}, "has markup"),
            (green, {}, "The name of a drug has"),
            (green, {"name": "Red", "code": "../x"}, "no code of a drug"),
            (b"no photo", {"name": "Red"}, "front.png"),
            (photo_jpeg(), {"name": "Red", "whole": "false"}, "Several pills were found"),
        ):
            refused = enroll(photo, **fields)
            check_error(refused, 422, message)
            assert (
                refused.json()["code"] == "not_enrolled" and refused.json()["detail"].count("Nothing was enrolled") == 1
            )
            assert (folder / GALLERY_FILE).read_bytes() == before and not list(folder.glob(".gallery.????????.npz"))
        assert [drug["name"] for drug in client.get("/gallery", headers=KEY).json()["drugs"]] == ["Green"]


def test_one_picture_of_several_drugs_names_none_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=Verdicts(identified=0.0)))
    save_classifier(folder, embeddings=True)
    white, admin = plain_photo((212, 207, 196)), {"X-Admin-Key": ADMIN}
    with service(folder) as client:
        question = {"headers": KEY, "files": {"image": plain_photo((210, 205, 190))}}
        assert client.post("/predict", **question).json()["pills"][0]["verdict"] == "identified"
        for code, name in (("K-000030", "White round tablet"), ("G-1", "Generic white")):
            fields = {"name": name, "code": code, "whole": "true", "same": "true"}
            files = [("images", ("front.png", white))]
            assert client.post("/gallery", headers=admin, data=fields, files=files).status_code == 200
        pill = client.post("/predict", **question).json()["pills"][0]
    assert pill["verdict"] == "ambiguous" and pill["reason"]["reason"] == "same_appearance"
    assert {drug["code"] for drug in pill["matches"][0]["drugs"]} == {"K-000030", "G-1"}
    assert {one["code"] for one in pill["candidates"][: pill["alike"]]} == {"K-000030", "G-1"}


def test_an_enrolled_drug_is_not_taken_for_a_trained_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    verdicts = Verdicts(identified=0.0, familiar=0.97, alike=0.1)  # the logits decide
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=verdicts))
    save_classifier(folder, embeddings=True)
    looks = {"red": (173, 92, 84), "brick": (188, 84, 66), "rust": (190, 84, 65), "white": (212, 207, 196)}
    photos = {name: plain_photo(colour) for name, colour in looks.items()}
    with service(folder) as client:

        def ask(name: str, top_k: int = 5) -> dict:
            files = {"image": photos[name]}
            return client.post("/predict", headers=KEY, files=files, params={"top_k": top_k}).json()["pills"][0]

        def enroll(name: str) -> None:
            fields, files = {"name": name, "code": f"G-{name}", "whole": "true"}, [("images", ("1.png", photos[name]))]
            assert client.post("/gallery", headers={"X-Admin-Key": ADMIN}, data=fields, files=files).status_code == 200

        assert {ask(name)["verdict"] for name in looks} == {"identified"}, "the logits are certain of all"
        enroll("brick")
        brick = ask("brick")
        assert brick["verdict"] == "ambiguous" and brick["reason"]["reason"] == "gallery_disagrees"
        assert [one["code"] for one in brick["candidates"][: brick["alike"]]] == ["K-000007", "G-brick"]
        for name, code in (("red", "K-000007"), ("white", "K-000030")):
            assert (ask(name)["verdict"], ask(name)["code"]) == ("identified", code), "no enrolled drug looks like it"
        enroll("rust")
        both = ask("brick")
        assert [one["code"] for one in both["candidates"][: both["alike"]]] == ["K-000007", "G-brick", "G-rust"]
        for top_k in (1, 2):
            few = ask("brick", top_k)
            assert len(few["candidates"]) == few["alike"] == top_k and few["verdict"] == "ambiguous"


def test_enrolled_look_alikes_are_both_candidates(folder: Path, monkeypatch: pytest.MonkeyPatch):
    verdicts = Verdicts(similar=0.97, familiar=0.8, alike=0.1)
    monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=verdicts))
    save_classifier(folder, embeddings=True)
    gallery, identifier = Gallery("classifier of 8", {}, ()), open_identifier(folder)
    for code, colour, imprint in (("G-1", GREEN, "AB"), ("G-2", (42, 161, 61), "CD"), ("G-3", VIOLET, "AB")):
        crop = np.full((64, 64, 3), colour, np.uint8)
        gallery = gallery.added([Drug(code, code)], [make_reference(identifier, crop, [code], "front", code, imprint)])
    write_gallery(gallery, folder / GALLERY_FILE)
    with service(folder) as client:

        def ask(colour: tuple[int, int, int]) -> dict:
            return client.post("/predict", headers=KEY, files={"image": plain_photo(colour)}).json()["pills"][0]

        green, violet = ask(GREEN), ask(VIOLET)
    assert (violet["verdict"], violet["code"], violet["differ"]) == ("identified", "G-3", [])
    assert green["verdict"] == "ambiguous" and green["alike"] == 2 and green["differ"] == ["imprint"]
    assert [one["code"] for one in green["candidates"][:2]] == ["G-1", "G-2"] and len(green["candidates"]) == 5
    assert 0.4 < green["candidates"][1]["confidence"] <= green["candidates"][0]["confidence"] < 0.6


def test_the_log_says_what_decides(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    few = {"known_photos": 3.0}
    for verdicts, enrolled, said in (
        (Verdicts(), False, "nothing is identified (not calibrated"),
        (Verdicts(chosen_on=few), False, "nothing is identified (it was calibrated with too few photos)"),
        (Verdicts(identified=1.0, chosen_on=few), False, "by the logits (calibrated on 3 photos)"),
        (Verdicts(similar=0.9, familiar=0.5), False, "nothing is identified (only the gallery of the training photos"),
        (Verdicts(similar=0.9, familiar=0.5), True, "by similarity (a reference of 0.9 or more is identified)"),
    ):
        monkeypatch.setattr(tiny_models, "RULES", replace(tiny_models.RULES, verdicts=verdicts))
        save_classifier(folder, embeddings=True)
        embedding = np.eye(128, dtype=np.float32)[0]
        reference = Reference(("X",), "", embedding, b"", "1")
        write_gallery(
            Gallery("classifier of 8", {"X": Drug("X", "X")}, (reference,) if enrolled else ()), folder / GALLERY_FILE
        )
        caplog.clear()
        load(folder, open_identifier)
        assert [record.getMessage() for record in caplog.records if f"verdicts: {said}" in record.getMessage()], said


def test_a_gallery_of_another_network_is_refused(folder: Path, command: Callable):
    foreign = Gallery("another network", {"X": Drug("X", "X")}, (Reference(("X",), "", np.ones(3), b"", "1"),))
    write_gallery(foreign, folder / GALLERY_FILE)
    for words in (("check",), ("enroll", "--name", "Green", "--whole", folder / "photos" / "Green")):
        status, _, err = command(*words)
        assert status == 2 and "was made with another network" in err and err.count("pillsnap: ") == 1
    with service(folder) as client:
        refused = client.post("/predict", headers=KEY, files={"image": plain_photo(GREEN)})
        assert refused.status_code == 503 and "another network" in refused.json()["detail"]


def service(folder: Path) -> TestClient:
    """A service with these models."""
    environment = Environment(api_keys=(RIGHT,), admin_keys=(ADMIN,), model_path=folder)
    return TestClient(create_app(load_settings(CONFIG, ["serve.requests_per_minute=0"]), environment))


def test_a_drug_is_enrolled_while_serving(folder: Path):
    with service(folder) as client:
        question = {"headers": KEY, "files": {"image": plain_photo((44, 150, 62))}}
        assert "matches" not in client.post("/predict", **question).json()["pills"][0]
        files = [("images", ("front.png", plain_photo(GREEN))), ("images", ("back.png", plain_photo((50, 170, 70))))]
        fields = {"name": "Green", "code": "G-1", "whole": "true"}
        assert client.post("/gallery", headers=KEY, data=fields, files=files).status_code == 401
        added = client.post("/gallery", headers={"X-Admin-Key": ADMIN}, data=fields, files=files)
        assert added.status_code == 200, added.text
        assert added.json()["drugs"] == [{"code": "G-1", "name": "Green", "references": 2, "sides": ["back", "front"]}]
        pill = client.post("/predict", **question).json()["pills"][0]
        match = pill["matches"][0]
        _, second, *others = pill["candidates"]
        assert second["name"] == "Green" and second["picture"] == match["picture"] and pill["verdict"] == "ambiguous"
        assert "picture" not in pill and not any("picture" in each for each in others), "it has no trained drug"
        assert match["drugs"][0]["name"] == "Green" and match["similarity"] > 0.9
        assert match["side"] in ("front", "back") and match["picture"].startswith("data:image/jpeg;base64,/9j/")
    assert isinstance(open_identifier(folder), GalleryIdentifier), "the next start serves it too"


def test_candidates_show_their_references(folder: Path):
    with service(folder) as client:
        fields = {"name": "White round tablet", "code": "K-000030", "whole": "true"}
        files = [("images", ("front.png", plain_photo((212, 207, 196))))]
        assert client.post("/gallery", headers={"X-Admin-Key": ADMIN}, data=fields, files=files).status_code == 200
        pill = client.post("/predict", headers=KEY, files={"image": plain_photo((210, 205, 190))}).json()["pills"][0]
    assert pill["code"] == "K-000030" and pill["picture"] == pill["candidates"][0]["picture"]
    assert pill["picture"].startswith("data:image/jpeg;base64,/9j/") and "picture" not in pill["candidates"][1]


def test_archive_and_store_carry_the_gallery(
    trained_run: Path, tmp_path: Path, tiny_data: Path, capfd: pytest.CaptureFixture
):
    settings = load_settings(trained_run / "config.yaml")
    export_run(trained_run, settings)
    models = trained_run / "export"
    words = ["gallery", "build", "--model", str(models), "--cfg", str(trained_run / "config.yaml"), "--per-side", "2"]
    assert cli.main([*words, "--data-root", str(tiny_data)]) == 0
    built = read_gallery(models / GALLERY_FILE)
    assert len(built.drugs) == 3 and {item.side for item in built.references} == {"front", "back"}
    assert len(built.references) == 12 and all(len(item.codes) == 1 for item in built.references)
    manifest = dataset_of_run(trained_run).manifest.filter(photo_kind="single")
    image, code = chosen_rows(manifest, 2).select("image", "code").row(0)
    enroll = ["gallery", "enroll", "--model", str(models), "--name", "Other", "--code", "G-1", "--whole", str(image)]
    capfd.readouterr()
    assert cli.main(enroll) == 2 and f"The same photo is given for G-1 and for {code}" in capfd.readouterr().err
    (models / GALLERY_FILE).unlink()
    assert cli.main(enroll) == 0
    assert cli.main([*words, "--data-root", str(tiny_data)]) == 2, "a photo that was enrolled as another drug"
    assert f"The same photo is given for {code} and for G-1" in capfd.readouterr().err
    assert cli.main([*words, "--same", "--data-root", str(tiny_data)]) == 0
    assert (code, "G-1") in {tuple(sorted(item.codes)[::-1]) for item in read_gallery(models / GALLERY_FILE).references}
    assert cli.main(["gallery", "remove", "--model", str(models), "G-1"]) == 0
    assert {item.photo for item in read_gallery(models / GALLERY_FILE).references} == {
        item.photo for item in built.references
    }
    make_archive(models, tmp_path / "release.tar")
    served = restore_archive(tmp_path / "release.tar", tmp_path / "releases")
    assert served is not None and read_gallery(tmp_path / "releases" / "current" / "models" / GALLERY_FILE) is not None
    store = open_store(tmp_path / "store", writing=True)
    for version in push_run(store, trained_run):
        promote(store, version.task, version.number)
    (tmp_path / "served").mkdir()
    write_gallery(Gallery("old network", {}, ()), tmp_path / "served" / GALLERY_FILE)
    pull_models(store, tmp_path / "served", tmp_path / "cache", {})
    assert read_gallery(tmp_path / "served" / GALLERY_FILE).drugs == built.drugs
    assert (tmp_path / "served" / "gallery-old network.npz").is_file()
    export_run(trained_run, settings)
    assert read_gallery(models / GALLERY_FILE).drugs == built.drugs, "exporting again keeps it"
    (models / GALLERY_FILE).unlink()
