"""Outlines and sizes in answers: the service, the command line, and what can't be outlined or measured."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tiny_models import KEY, check_error, client_for, post_photo, save_segmenter

from pillsnap.answer.outlines import Outliner, OutlinerError, load_outliner
from pillsnap.answer.shapes.background import cut_out
from pillsnap.answer.shapes.camera import ScaleError, camera_view
from pillsnap.answer.shapes.references import COINS
from pillsnap.cli import main
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.outlines import OutlineError, fill_polygons
from pillsnap.runtime.session import ModelError

MM = 0.1  # of a pixel of the photo
PILLS = {"K-000030": (16.8, 16.8), "K-000007": (22.0, 9.2)}  # length and width of what `photo_jpeg` shows, mm


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models with a segmenter beside them."""
    made = shutil.copytree(models, tmp_path_factory.mktemp("outlined") / "models")
    save_segmenter(made)
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_for(folder) as opened:
        yield opened


def true_masks() -> dict[str, np.ndarray]:
    """Which pixels of `photo_jpeg` are whose."""
    masks = {}
    for code, ellipse in {"K-000030": ((220, 200), (84, 84), 0), "K-000007": ((456, 328), (110, 46), 25)}.items():
        pixels = np.zeros((480, 640), np.uint8)
        masks[code] = cv2.ellipse(pixels, *ellipse, 0, 360, 1, -1).astype(bool)
    return masks


def masks_of(prediction: dict) -> dict[str, np.ndarray]:
    return {pill["code"]: fill_polygons(pill["outline"], 640, 480) for pill in prediction["pills"]}


def test_an_answer_has_the_outlines_that_were_asked_for(client: TestClient, jpeg: bytes) -> None:
    plain = post_photo(client, jpeg, "?pipeline=combo").json()
    assert all("outline" not in pill and "size_mm" not in pill for pill in plain["pills"])
    assert "outline" not in plain["timings_ms"], "nothing is outlined unasked"
    response = post_photo(client, jpeg, "?pipeline=combo&masks=true")
    assert response.status_code == 200, response.text
    prediction = response.json()
    for code, mask in masks_of(prediction).items():
        true = true_masks()[code]
        assert (mask & true).sum() / (mask | true).sum() > 0.95, code
    assert all(pill["outline_score"] > 0.8 and "size_mm" not in pill for pill in prediction["pills"])
    assert prediction["timings_ms"]["outline"] > 0 and not prediction["notes"]
    single = post_photo(client, jpeg, "?masks=true").json()
    assert list(masks_of(single)) == ["K-000030"], "the field of a form does the same"
    form = client.post("/predict", headers=KEY, files={"image": jpeg}, data={"masks": "true"})
    assert form.json()["pills"] == single["pills"]
    assert client.get("/health").json()["model"]["segmenter"] == "tiny segmenter"


def test_a_batch_has_outlines_too(client: TestClient, jpeg: bytes) -> None:
    files = [("images", jpeg), ("images", b"a letter")]
    answers = client.post("/batch?masks=true&mm_per_pixel=0.1", headers=KEY, files=files).json()["answers"]
    assert answers[0]["prediction"]["pills"][0]["outline"] and answers[1]["problem"]["code"] == "not_an_image"


def test_a_service_without_segmenter_says_so_and_goes_on(models: Path, jpeg: bytes) -> None:
    bare = client_for(models)
    for query in ("?masks=true", "?mm_per_pixel=0.1", "?scale=card"):
        check_error(post_photo(bare, jpeg, query), 422, "segmenter.onnx")
    assert post_photo(bare, jpeg).status_code == 200


def test_a_segmenter_that_can_not_be_used_is_no_model(models: Path, tmp_path: Path, jpeg: bytes) -> None:
    shutil.copytree(models, tmp_path / "models")
    save_segmenter(tmp_path / "models", margin=0.5)
    check_error(post_photo(client_for(tmp_path / "models"), jpeg), 503, "margin 0.5")
    shutil.copy(models / "detector.onnx", tmp_path / "models" / "segmenter.onnx")
    check_error(post_photo(client_for(tmp_path / "models"), jpeg), 503, "not a segmenter")


@pytest.mark.parametrize("reduced", [False, True])
def test_sizes_are_measured_where_the_scale_is_known(folder: Path, jpeg: bytes, reduced: bool) -> None:
    settings = ["serve.requests_per_minute=0", *(["data.max_pixels=200000"] if reduced else [])]
    prediction = post_photo(
        client_for(folder, ("jC2-9wqXr_LmT4vYd0Ks",), *settings), jpeg, f"?pipeline=combo&mm_per_pixel={MM}"
    ).json()
    for pill in prediction["pills"]:
        assert pill["size_mm"] == pytest.approx(
            dict(zip(("length", "width"), PILLS[pill["code"]], strict=True)), rel=0.06 if reduced else 0.03
        )


def test_a_coin_and_a_card_tell_the_scale(client: TestClient, jpeg: bytes) -> None:
    photo = np.array(Image.open(io.BytesIO(jpeg)))
    cv2.circle(photo, (520, 100), round(COINS["KRW100"] / 2 / MM * 0.5), (205, 205, 205), -1, cv2.LINE_AA)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    prediction = post_photo(client, buffer.getvalue(), "?pipeline=combo&scale=coin:KRW100").json()
    assert not prediction["notes"], prediction["notes"]
    white = next(pill["size_mm"] for pill in prediction["pills"] if pill["code"] == "K-000030")
    # 168 pixels of 0.2 mm, less what a thick pill seems larger so near to a camera.
    assert white == pytest.approx({"length": 31.6, "width": 31.6}, rel=0.03)
    for scale, word in (("card", "The card was not found"), ("coin:KRW500", "The coin was not found")):
        missing = post_photo(client, jpeg, f"?pipeline=combo&scale={scale}").json()
        assert [pill["size_mm"] for pill in missing["pills"]] == [None, None] and missing["notes"][0].startswith(word)
        assert all(pill["outline"] for pill in missing["pills"])


@pytest.mark.parametrize(
    "query, words",
    [
        ("mm_per_pixel=-1", "mm_per_pixel"),
        ("mm_per_pixel=0", "mm_per_pixel"),
        ("mm_per_pixel=nan", "mm_per_pixel"),
        ("mm_per_pixel=inf", "mm_per_pixel"),
        ("mm_per_pixel=wide", "mm_per_pixel"),
        ("mm_per_pixel=0.1&camera_elevation=20", "camera_elevation"),
        ("camera_elevation=60", "tells no size"),
        ("scale=coin:KRW300", "coin:KRW500"),
        ("scale=", "unknown"),
        ("scale=card&mm_per_pixel=0.1", "leave out"),
    ],
)
def test_a_scale_that_tells_no_size_is_one_sentence(client: TestClient, jpeg: bytes, query: str, words: str) -> None:
    response = post_photo(client, jpeg, f"?{query}")
    check_error(response, 422, words)
    assert "\n" not in response.json()["detail"]


def test_a_photo_without_a_pill_has_no_outline(client: TestClient, jpeg: bytes) -> None:
    for query in ("?pipeline=combo", "?pipeline=single"):
        prediction = post_photo(client, jpeg, f"{query}&masks=true&mm_per_pixel=0.1&conf_threshold=0.99").json()
        assert any(note.startswith("No pill was detected") for note in prediction["notes"])
        assert all(pill["outline"] == [] and pill["size_mm"] is None for pill in prediction["pills"])
    black = io.BytesIO()
    Image.new("RGB", (640, 480)).save(black, "PNG")
    dark = post_photo(client, black.getvalue(), "?pipeline=combo&masks=true").json()
    assert dark["notes"][-1].startswith("No outline for pill 1, 2:") and dark["pills"][0]["outline_score"] is None
    with pytest.raises(OutlinerError, match="no pill in the photo"):
        Outliner(lambda batch: batch[:, :1], 32).outline(np.zeros((9, 9, 3), np.uint8), [])


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5), (700, 500)])
def test_odd_photos_are_outlined_and_measured_without_an_error(client: TestClient, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for pixels in (noise, noise // 255 * 0, noise // 4 + 190):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        for scale in ("scale=card", "scale=coin:EUR1", "mm_per_pixel=0.1&camera_elevation=60&camera_distance=50"):
            response = post_photo(client, buffer.getvalue(), f"?pipeline=combo&masks=true&{scale}")
            assert response.status_code == 200, response.text


def test_touching_pills_share_no_pixel(folder: Path) -> None:
    photo = np.full((200, 300, 3), 70, np.uint8)
    for middle in ((90, 100), (190, 100)):
        cv2.circle(photo, middle, 50, (240, 240, 240), -1)
    outliner = load_outliner(folder / "segmenter.onnx", 1)
    boxes = [Box(40, 50, 140, 150), Box(140, 50, 240, 150)]
    left, right = outliner.masks(photo, boxes)
    assert not (left & right).any()
    for mask, box in ((left, boxes[0]), (right, boxes[1])):
        columns = np.nonzero(mask.any(axis=0))[0]
        assert abs(columns[0] - box.x1) <= 2 and abs(columns[-1] + 1 - box.x2) <= 2


def test_masks_and_polygons_that_do_not_belong_to_the_photo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutlineError, match="the mask has 6 x 5 pixels, its photo 8 x 8"):
        cut_out(np.zeros((8, 8, 3), np.uint8), np.ones((5, 6), bool))
    with pytest.raises(OutlineError, match="a polygon has 2 points"):
        fill_polygons([[1, 1, 4, 4]], 8, 8)
    with pytest.raises(OutlineError, match="leaves the 8 x 8 photo"):
        fill_polygons([[1, 1, 40, 4, 4, 4]], 8, 8)
    with pytest.raises(ScaleError, match="positive"):
        camera_view((8, 8), float("nan"))
    with pytest.raises(ModelError, match="There is no model"):
        load_outliner(tmp_path / "segmenter.onnx")


def test_the_command_prints_sizes(
    folder: Path, models: Path, tmp_path: Path, jpeg: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg)
    words = ["predict", str(photo), "--pipeline", "combo"]
    assert main([*words, "--model", str(folder), "--mm-per-pixel", str(MM)]) == 0
    shown = capsys.readouterr().out
    assert "size in mm" in shown and "  22.2 x 9.4\n" in shown
    assert main([*words, "--model", str(folder), "--masks", "--json"]) == 0
    assert '"outline": [[' in capsys.readouterr().out
    assert main([*words, "--model", str(folder)]) == 0 and "size in mm" not in capsys.readouterr().out
    assert main([*words, "--model", str(models), "--masks"]) == 1
    assert "no segmenter.onnx" in capsys.readouterr().err
    assert main([*words, "--model", str(folder), "--scale", "coin:KRW300"]) != 0
    assert "coin:KRW500" in capsys.readouterr().err
