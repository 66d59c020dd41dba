"""Masks of pills: from the labels of each layout to the table, composed photos, and inputs that can't be used."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from faster_coco_eval.core.mask import encode

from pillsnap.config.load import load_settings
from pillsnap.data.manifest import prepare_data
from pillsnap.data.readers.layouts import read_all
from pillsnap.masks.cutouts import CutoutArchive, MaskError
from pillsnap.masks.write import write_composed
from pillsnap.runtime.outlines import (
    OutlineError,
    decode_runs,
    encode_runs,
    fill_polygons,
    mask_of,
    outline_text,
    trace,
)

WIDTH, HEIGHT = 90, 60


def oval(x: float = 40, y: float = 30, across: float = 22, down: float = 14) -> np.ndarray:
    """The mask of a pill."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    mask: np.ndarray = ((columns + 0.5 - x) / across) ** 2 + ((rows + 0.5 - y) / down) ** 2 < 1
    return mask


def write_photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 120, np.uint8))


def write_coco(root: Path, segmentation: object, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """A dataset of one photo and one pill."""
    write_photo(root / "train" / "1.png")
    left, top, width, height = cv2.boundingRect(oval().astype(np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": size[0], "height": size[1]}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [left, top, width, height],
                "segmentation": segmentation,
            }
        ],
        "categories": [{"id": 1, "name": "aspirin"}],
    }
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["polygon", "runs"])
def test_coco_masks_reach_the_table(tmp_path: Path, form: str) -> None:
    mask = oval()
    write_coco(tmp_path, trace(mask, 0) if form == "polygon" else encode_runs(mask))
    (record,) = read_all(tmp_path).records
    assert np.array_equal(mask_of(record.outline, record.width, record.height), mask)


def test_yolo_polygons_reach_the_table_and_boxes_have_no_mask(tmp_path: Path) -> None:
    mask = oval()
    write_photo(tmp_path / "images" / "1.png")
    points = np.reshape(trace(mask, 0)[0], (-1, 2)) / (WIDTH, HEIGHT)
    lines = ["0 " + " ".join(f"{side:.8f}" for side in points.ravel()), "0 0.9 0.9 0.1 0.1"]
    lines.append("0 0.05 0.05 0.15 0.05 0.15 0.15 0.05 0.15")  # a turned box: its corners are none of the pill's
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [aspirin]")
    records = sorted(read_all(tmp_path).records, key=lambda record: -len(record.outline))
    assert np.array_equal(mask_of(records[0].outline, WIDTH, HEIGHT), mask)
    assert [record.outline for record in records[1:]] == ["", ""]


def test_label_studio_polygons_reach_the_table(tmp_path: Path) -> None:
    mask = oval()
    write_photo(tmp_path / "images" / "1.png")
    points = (np.reshape(trace(mask, 0)[0], (-1, 2)) / (WIDTH, HEIGHT) * 100).tolist()
    region = {
        "id": "a",
        "type": "polygonlabels",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "value": {"points": points, "polygonlabels": ["aspirin"]},
    }
    task = {"id": 1, "data": {"image": "/data/upload/3/0a1b2c3d-1.png"}, "annotations": [{"result": [region]}]}
    (tmp_path / "project.json").write_text(json.dumps([task]))
    result = read_all(tmp_path)
    (record,) = result.records
    assert record.code == "aspirin" and record.source == "label_studio" and not result.quarantined
    assert np.array_equal(mask_of(record.outline, WIDTH, HEIGHT), mask)


@pytest.mark.parametrize(
    ("segmentation", "why"),
    [
        ([[1, 1, 9, 9]], "a polygon has 2 points"),
        ([[1, 1, 400, 1, 9, 9]], r"leaves the 90 x 60 photo"),
        ([[1, 1, float("inf"), 1, 9, 9]], "no number"),
        (encode_runs(np.ones((30, 90), bool)), "the mask has 90 x 30 pixels, its photo 90 x 60"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 20]}, r"make 30 pixels, its photo has 90 x 60 = 5400"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, 5405]}, "make 5400 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [5400]}, "the mask is empty"),
        ({"size": [HEIGHT, WIDTH], "counts": "4Q"}, "cannot be read"),
        ({"size": [HEIGHT, WIDTH]}, "cannot be read"),
        ("somewhere", "cannot be read"),
    ],
)
def test_an_outline_that_is_none_is_one_sentence_and_its_box_stays(
    tmp_path: Path, segmentation: object, why: str
) -> None:
    with pytest.raises(OutlineError, match=why) as raised:
        outline_text(segmentation, WIDTH, HEIGHT)
    assert "\n" not in str(raised.value)
    if "leaves" in why or "number" in why:  # box and outline lie in different places, so that neither is trusted
        return
    write_coco(tmp_path, segmentation)
    result = read_all(tmp_path)
    (record,) = result.records
    assert record.outline == "" and record.x2 > record.x1, "the pill counts by its box"
    assert result.quarantined_by_reason() == {"outline_invalid": 1}
    assert result.quarantined[0].detail.endswith("the pill counts by its box")


def test_a_polygon_fills_the_pixels_that_it_half_covers() -> None:
    assert fill_polygons([[2, 1, 6, 1, 6, 4, 2, 4]], 10, 8).sum() == 12
    assert fill_polygons([[2.4, 1, 6.4, 1, 6.4, 4, 2.4, 4]], 10, 8)[2].nonzero()[0].tolist() == [2, 3, 4, 5]
    assert fill_polygons([[2.6, 1, 6.6, 1, 6.6, 4, 2.6, 4]], 10, 8)[2].nonzero()[0].tolist() == [3, 4, 5, 6]
    assert fill_polygons([[8, 6, 12, 6, 12, 10, 8, 10]], 10, 8).sum() == 4, "two pixels outside are tolerated"
    with pytest.raises(OutlineError, match="covers no pixel"):
        fill_polygons([[1.0, 1.0, 1.1, 1.0, 1.1, 1.1]], 10, 8)


def test_compressed_runs_of_the_coco_api() -> None:
    mask = oval() & ~oval(across=8, down=5)
    packed = encode(np.asfortranarray(mask.astype(np.uint8)))
    text = packed["counts"].decode() if isinstance(packed["counts"], bytes) else packed["counts"]
    assert np.array_equal(decode_runs({"size": packed["size"], "counts": text}, WIDTH, HEIGHT), mask)


def write_studio(path: Path, drugs: int) -> None:
    """An archive of plain pills on black."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(drugs):
            photo = np.zeros((90, 90, 3), np.uint8)
            cv2.ellipse(photo, (45, 45), (34, 20 + number), 30, 0, 360, (200, 180 - 20 * number, 120), cv2.FILLED)
            archive.writestr(f"drug-{number}/front.png", cv2.imencode(".png", photo)[1].tobytes())


def write_table(root: Path, boxes: str = "0 0.1 0.1 0.1 0.1") -> None:
    """Photos of a table with a pill in a corner."""
    root.mkdir()
    rng = np.random.default_rng(3)
    for number in range(3):
        cv2.imwrite(str(root / f"{number}.png"), rng.integers(90, 150, (160, 200, 3), np.uint8))
        (root / f"{number}.txt").write_text(boxes)
    (root / "data.yaml").write_text("train: .\nnames: [aspirin]")


def test_a_composed_dataset_trains_like_any_other(tmp_path: Path) -> None:
    write_studio(tmp_path / "studio.zip", 5)
    write_table(tmp_path / "photos")
    archive = CutoutArchive(tmp_path / "studio.zip")
    out = write_composed(archive, [tmp_path / "photos"], tmp_path / "out", counts=(6, 3), size=128)
    again = write_composed(archive, [tmp_path / "photos"], tmp_path / "again", counts=(6, 3), size=128)
    for path in out.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(out)).read_bytes(), "the same seed, the same files"
    overrides = [f"paths.cache_root={tmp_path / 'cache'}", "train.only=detector", "data.min_class_images=1"]
    settings = load_settings(overrides=overrides)
    manifest = prepare_data(settings, out).manifest
    assert manifest["outline"].str.len_chars().min() > 2
    for outline, width, height, *box in manifest.select("outline", "width", "height", "x1", "y1", "x2", "y2").rows():
        left, top, across, down = cv2.boundingRect(mask_of(outline, width, height).astype(np.uint8))
        assert [left, top, left + across, top + down] == box, "boxes are those of the visible pixels"


def test_composing_ends_with_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    write_studio(tmp_path / "one.zip", 1)
    write_studio(tmp_path / "studio.zip", 3)
    write_table(tmp_path / "photos")
    write_table(tmp_path / "full", "0 0.5 0.5 1 1")
    with zipfile.ZipFile(tmp_path / "black.zip", "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"{name}/1.png", cv2.imencode(".png", np.zeros((50, 50, 3), np.uint8))[1].tobytes())
    for cutouts, photos, why in (
        ("one.zip", "photos", "1 drug or capture group"),
        ("studio.zip", "full", "No photo has room"),
        ("black.zip", "photos", "the photo is black"),
    ):
        with pytest.raises(MaskError, match=why):
            write_composed(CutoutArchive(tmp_path / cutouts), [tmp_path / photos], tmp_path / "out", (2, 1), 96)
        assert not (tmp_path / "out").exists()
