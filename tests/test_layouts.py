"""Datasets as labelling tools and people leave them: what is read, what is put aside, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data import manifest as manifest_module
from pillsnap.data.manifest import prepare_data
from pillsnap.data.readers.layouts import choose_layout, read_all
from pillsnap.data.reading.records import DataError, ScanError, ScanResult
from pillsnap.data.scan.scan import scan

SIZE = (80, 60)
BOX = "0.5 0.5 0.25 0.5"  # of YOLO: 30 to 50 x 15 to 45 pixels
BBOX = [30, 15, 20, 30]  # of COCO: the same


@pytest.fixture
def settings_for(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a plain machine with a cache of their own; scans run in this process."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(manifest_module, "scan", partial(scan, workers=1))
    return lambda *overrides: load_settings(profile="cpu", overrides=[f"paths.cache_root={cache}", *overrides])


def photo(path: Path, seed: int = 0, orientation: int = 1, size: tuple[int, int] = SIZE) -> Path:
    """A photo of coloured noise, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(cells).resize(size).save(path, exif=exif)
    return path


def text(path: Path, content: str, encoding: str = "utf-8") -> Path:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def yolo(root: Path, data: str, labels: dict[str, str]) -> Path:
    """A YOLO dataset with its labels in the usual place: label by photo below the root, such as "images/train/1"."""
    for number, (name, label) in enumerate(labels.items()):
        photo(root / f"{name}.jpg", number)
        text(root / f"{name.replace('images', 'labels', 1)}.txt", label)
    text(root / "data.yaml", data)
    return root


def coco(path: Path, images: list[dict], boxes: list[dict], categories: list[tuple[int, str]]) -> Path:
    """A JSON of boxes; ids, sizes and boxes that are not given are the usual ones."""
    sized = [{"id": number, "width": SIZE[0], "height": SIZE[1]} | entry for number, entry in enumerate(images)]
    numbered = [{"id": number, "image_id": number, "bbox": BBOX} | entry for number, entry in enumerate(boxes)]
    named = [{"id": number, "name": name} for number, name in categories]
    return text(path, json.dumps({"images": sized, "annotations": numbered, "categories": named}, ensure_ascii=False))


def corners(result: ScanResult) -> list[tuple[float, float, float, float]]:
    """The boxes of all pills."""
    return [(pill.x1, pill.y1, pill.x2, pill.y2) for pill in result.records]


def said(result: ScanResult, *words: str) -> bool:
    """Whether one note has all of these words."""
    return any(all(word in note for word in words) for note in result.notes)


# One number, one drug


def test_coco_a_number_of_two_drugs_is_refused(tmp_path):
    photo(tmp_path / "train/1.jpg")
    categories = [(1, "aspirin"), (2, "tylenol"), (1, "ibuprofen")]
    coco(tmp_path / "train/_annotations.coco.json", [{"file_name": "1.jpg"}], [{"category_id": 1}], categories)
    with pytest.raises(ScanError, match="the number 1 to two drugs, aspirin and ibuprofen"):
        read_all(tmp_path)


def test_coco_a_name_with_two_numbers_is_one_drug_and_said(tmp_path):
    for number in range(2):
        photo(tmp_path / f"train/{number}.jpg", number)
    path = tmp_path / "train/_annotations.coco.json"
    images = [{"file_name": "0.jpg"}, {"file_name": "1.jpg"}]
    coco(path, images, [{"category_id": 1}, {"category_id": 3}], [(1, "aspirin"), (3, " aspirin ")])
    result = read_all(tmp_path)
    assert {pill.code for pill in result.records} == {"aspirin"}
    assert said(result, "lists aspirin under the numbers 1 and 3", "one drug")


def test_coco_each_file_is_read_with_its_own_numbers_and_that_is_said(tmp_path):
    for split, categories in (
        ("train", [(0, "pills"), (1, "red"), (2, "green")]),
        ("valid", [(1, "green"), (2, "Red")]),
    ):
        photo(tmp_path / split / "1.jpg", len(categories))
        path = tmp_path / split / "_annotations.coco.json"
        coco(path, [{"file_name": "1.jpg"}], [{"category_id": 1}], categories)
    result = read_all(tmp_path)
    assert {pill.official_split: pill.code for pill in result.records} == {"train": "red", "val": "green"}
    assert said(result, "the number 1 is red in train/", "green in valid/") and said(result, "Red and red", "2 drugs")


def test_coco_numbers_as_text_are_numbers_and_fractions_are_none(tmp_path):
    for number in range(2):
        photo(tmp_path / f"train/{number}.jpg", number)
    images = [{"file_name": "0.jpg", "id": 7}, {"file_name": "1.jpg", "id": "8"}]
    boxes = [{"image_id": "7", "category_id": "1"}, {"image_id": 8, "category_id": 1.5}]
    coco(tmp_path / "train/_annotations.coco.json", images, boxes, [(1, "aspirin")])
    result = read_all(tmp_path)
    assert len(result.records) == 1 and result.quarantined_by_reason() == {"box_missing": 1}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("names: {0: aspirin, 1: biotin, 0: ibuprofen}", "the number 0 to two drugs, aspirin and ibuprofen"),
        ("names: {0: aspirin, 00: ibuprofen}", "the number 0 to two drugs, aspirin and ibuprofen"),
        ("names: [aspirin, biotin]\nnames: [biotin, aspirin]", "has the key names 2 times"),
        ("names: [aspirin, biotin]\ntrain: images/other", "has the key train 2 times"),
    ],
)
def test_yolo_names_that_contradict_each_other_are_refused(tmp_path, names, sentence):
    with pytest.raises(DataError, match=sentence):
        read_all(yolo(tmp_path, f"train: images/train\n{names}\n", {"images/train/1": f"0 {BOX}"}))


def test_yolo_a_name_with_two_numbers_is_one_drug_and_said(tmp_path):
    labels = {"images/train/1": f"0 {BOX}", "images/train/2": f"2 {BOX}"}
    result = read_all(yolo(tmp_path, "train: images/train\nnc: 4\nnames: [aspirin, biotin, aspirin]\n", labels))
    assert {pill.code for pill in result.records} == {"aspirin"}
    assert said(result, "lists aspirin under the numbers 0 and 2") and said(result, "nc in data.yaml says 4 classes")


def test_yolo_a_list_beside_the_labels_with_another_order_is_refused(tmp_path):
    root = yolo(tmp_path, "train: images/train\nnames: [aspirin, biotin]\n", {"images/train/1": f"0 {BOX}"})
    text(root / "labels/train/classes.txt", "aspirin\nbiotin\n")
    assert len(read_all(root).records) == 1
    text(root / "labels/train/classes.txt", "biotin\naspirin\n")
    with pytest.raises(ScanError, match="The number 0 is aspirin in .*data.yaml, but biotin in .*classes.txt"):
        read_all(root)


def test_yolo_an_export_inside_with_other_numbers_is_refused(tmp_path):
    for name, order in (("first", "[aspirin, biotin]"), ("second", "[biotin, aspirin]")):
        yolo(tmp_path / name, f"train: images\nnames: {order}\n", {"images/1": f"0 {BOX}"})
    text(tmp_path / "data.yaml", "train: [first/images]\nnames: [aspirin, biotin, cetirizine]\n")
    assert len(read_all(tmp_path).records) == 1
    text(tmp_path / "data.yaml", "train: [first/images, second/images]\nnames: [aspirin, biotin, cetirizine]\n")
    with pytest.raises(ScanError, match="The number 0 is aspirin in .*, but biotin in .*second/data.yaml"):
        read_all(tmp_path)


def test_yolo_names_from_one_and_labels_from_zero_are_refused(tmp_path):
    labels = {"images/1": f"0 {BOX}", "images/2": f"1 {BOX}"}
    root = yolo(tmp_path, "train: images\nnames: {1: aspirin, 2: biotin}\n", labels)
    with pytest.raises(ScanError, match="numbers the drugs from 1 to 2, but the labels use 0 and never 2"):
        read_all(root)
    text(root / "labels/2.txt", f"2 {BOX}")
    assert read_all(root).quarantined_by_reason() == {"class_unknown": 1}


def test_class_folders_that_become_one_drug_are_said(tmp_path):
    for number, folder in enumerate(("train/aspirin", "train/aspirin ", "train/biotin", "val/Biotin")):
        photo(tmp_path / folder / "1.jpg", number)
    result = read_all(tmp_path)
    assert sorted(pill.code for pill in result.records) == ["Biotin", "aspirin", "aspirin", "biotin"]
    assert said(result, "'aspirin' and 'aspirin '", "one drug, aspirin") and said(
        result, "Biotin and biotin", "2 drugs"
    )


# Turned boxes and outlines


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"bbox": [10, 25, 60, 10], "attributes": {"occluded": False, "rotation": 90.0}}, (35, 0, 45, 60)),
        ({"bbox": [30, 20, 20, 20], "rotation": "45"}, (25.858, 15.858, 54.142, 44.142)),
        ({"bbox": [30, 20, 20, 20], "attributes": {"rotation": 0.0}}, (30, 20, 50, 40)),
        ({"bbox": [40, 10, 60, 30, 40, 50, 20, 30]}, (20, 10, 60, 50)),
        ({"bbox": [], "segmentation": [[10, 5, 30, 5, 30, 25], [30, 5, 40, 5, 40, 30]]}, (10, 5, 40, 30)),
        ({"bbox": [20, 15, 10, 5, 30], "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]}, (10, 5, 30, 25)),
        ({"bbox": [30, 15, 20, 30], "segmentation": {"counts": "abc", "size": [60, 80]}}, (30, 15, 50, 45)),
    ],
)
def test_coco_the_box_around_a_turned_pill(tmp_path, entry, expected):
    photo(tmp_path / "train/1.jpg")
    path = tmp_path / "train/_annotations.coco.json"
    coco(path, [{"file_name": "1.jpg"}], [entry | {"category_id": 1}], [(1, "aspirin")])
    result = read_all(tmp_path)
    assert corners(result) == [pytest.approx(expected, abs=0.01)]
    changed = "rotation" in str(entry) and expected[0] != 30 or len(entry["bbox"]) != 4
    assert (said(result, "1 boxes are turned") or said(result, "1 pills have an outline and no box")) == changed


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"bbox": [40, 30, 20, 10, 1.57]}, "box_missing"),  # of which corner or centre, degrees or radians
        ({"bbox": [], "segmentation": {"counts": [1, 2], "size": [60, 80]}}, "box_missing"),
        ({"bbox": [1, 1, 8, 3], "segmentation": [[40, 30, 60, 30, 60, 50, 40, 50]]}, "label_duplicate"),
        ({"bbox": [30, 15, 20, 30], "attributes": {"rotation": "steep"}}, "label_unreadable"),
        ({"bbox": [0, 0, 70, 10], "attributes": {"rotation": 90}}, "box_outside"),
        ({"bbox": [0.25, 0.25, 0.5, 0.5]}, "box_missing"),  # fractions of the image
    ],
)
def test_coco_boxes_that_can_be_understood_in_several_ways_are_put_aside(tmp_path, entry, reason):
    photo(tmp_path / "train/1.jpg")
    path = tmp_path / "train/_annotations.coco.json"
    coco(path, [{"file_name": "1.jpg"}], [entry | {"category_id": 1}], [(1, "aspirin")])
    assert read_all(tmp_path).quarantined_by_reason() == {reason: 1}


def test_yolo_corners_of_turned_boxes(tmp_path):
    labels = {"images/1": "0 0.5 0.1 0.7 0.5 0.5 0.9 0.3 0.5", "images/2": "0 0.9 0.3 1.01 0.5 0.9 0.7 0.7 0.5"}
    result = read_all(yolo(tmp_path, "train: images\nnames: [aspirin]\n", labels))
    expected = [(24, 6, 56, 54), (56, 18, 80, 42)]
    assert corners(result) == [pytest.approx(box) for box in expected]
    text(tmp_path / "labels/2.txt", f"0 {BOX} 45")
    result = read_all(tmp_path)
    assert result.quarantined_by_reason() == {"label_unreadable": 1} and "an angle" in result.quarantined[0].detail


# The dataset's own split


def test_yolo_splits_that_number_their_photos_alike_stay_whole(tmp_path, settings_for):
    labels = {
        f"{split}/images/{number:04}": f"{number % 2} {BOX}"
        for split, count in (("train", 12), ("valid", 4), ("test", 4))
        for number in range(count)
    }
    data = "train: ../train/images\nvalid: ../valid/images\ntest: ../test/images\nnames: [red, green]\n"
    report = prepare_data(settings_for(), yolo(tmp_path, data, labels)).report
    assert report["left_out"] == {}
    assert [report["photos_by_split"][split] for split in ("train", "validation", "test")] == [12, 4, 4]


@pytest.mark.parametrize("layout", ["yolo", "coco", "folders"])
def test_source_photos_of_one_name_in_two_splits_stay_and_are_said(tmp_path, layout, settings_for):
    for seed, split in enumerate(("train", "valid")):
        for drug in range(2):
            names = [f"{drug}{number}_jpg.rf.{seed}{number}.jpg" for number in range(6 if split == "train" else 2)]
            for number, name in enumerate(names):
                folder = {"yolo": f"{split}/images", "coco": split, "folders": f"{split}/drug {drug}"}[layout]
                photo(tmp_path / folder / name, 100 * seed + 10 * drug + number)
                if layout == "yolo":
                    text(tmp_path / split / "labels" / f"{name[:-4]}.txt", f"{drug} {BOX}")
        if layout == "coco":
            images = sorted(path.name for path in (tmp_path / split).glob("*.jpg"))
            boxes = [{"category_id": int(name[0])} for name in images]
            path = tmp_path / split / "_annotations.coco.json"
            coco(path, [{"file_name": name} for name in images], boxes, [(0, "a"), (1, "b")])
    if layout == "yolo":
        text(tmp_path / "data.yaml", "train: train/images\nval: valid/images\nnames: [a, b]\n")
    dataset = prepare_data(settings_for(), tmp_path)
    assert dataset.report["format"] == layout and dataset.report["left_out"] == {}
    assert dataset.report["photos_by_split"]["validation"] == 4
    assert any("4 photos, such as 00_jpg, have augmented versions" in line for line in dataset.report["shortfalls"])


def test_versions_of_one_photo_in_one_folder_stay_together(tmp_path, settings_for):
    names = [f"{drug}{number}_jpg.rf.{copy}.jpg" for drug in (0, 1) for number in range(6) for copy in "ab"]
    for number, name in enumerate(names):
        photo(tmp_path / "images" / name, number)
        text(tmp_path / "labels" / f"{name[:-4]}.txt", f"{name[0]} {BOX}")
    text(tmp_path / "train.txt", "\n".join(f"images/{name}" for name in names[:-1]))
    text(tmp_path / "val.txt", f"images/{names[-1]}")
    text(tmp_path / "data.yaml", "train: train.txt\nval: val.txt\nnames: [a, b]\n")
    assert prepare_data(settings_for(), tmp_path).report["left_out"] == {"group_also_in_training": 1}


def test_coco_one_folder_with_photos_that_differ_in_their_suffix(tmp_path, settings_for):
    for split, suffix, count in (("train", "jpg", 8), ("val", "png", 4)):
        images = [{"file_name": f"{number}.{suffix}"} for number in range(count)]
        for number, entry in enumerate(images):
            photo(tmp_path / "images" / entry["file_name"], number + 50 * (split == "val"))
        boxes = [{"category_id": number % 2} for number in range(count)]
        coco(tmp_path / f"annotations/instances_{split}.json", images, boxes, [(0, "a"), (1, "b")])
    report = prepare_data(settings_for(), tmp_path).report
    assert report["left_out"] == {} and report["photos_by_split"]["validation"] == 4


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
def test_yolo_all_names_of_the_validation_split_are_known(tmp_path, key):
    labels = {"images/train/1": f"0 {BOX}", "images/val/2": f"0 {BOX}"}
    result = read_all(yolo(tmp_path, f"train: images/train\n{key}: images/val\nnames: [aspirin]\n", labels))
    assert sorted(pill.official_split for pill in result.records) == ["train", "val"]


def test_coco_a_drug_whose_name_begins_like_a_split_is_none(tmp_path):
    photo(tmp_path / "valsartan/1.jpg")
    path = tmp_path / "valsartan/_annotations.coco.json"
    coco(path, [{"file_name": "1.jpg"}], [{"category_id": 1}], [(1, "valsartan")])
    assert [pill.official_split for pill in read_all(tmp_path).records] == [""]


def test_coco_a_file_of_everything_does_not_replace_the_split(tmp_path):
    for number, split in enumerate(("train", "val")):
        photo(tmp_path / f"images/{split}.jpg", number)
        coco(tmp_path / f"{split}.json", [{"file_name": f"{split}.jpg"}], [{"category_id": 1}], [(1, "a")])
    images, boxes = [{"file_name": "train.jpg"}, {"file_name": "val.jpg"}], [{"category_id": 1}, {"category_id": 1}]
    coco(tmp_path / "all.json", images, boxes, [(1, "a")])
    result = read_all(tmp_path)
    assert {Path(pill.image).stem: pill.official_split for pill in result.records} == {"train": "train", "val": "val"}
    assert result.quarantined_by_reason() == {"label_duplicate": 2}


# Lists of photos


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp949"])
@pytest.mark.parametrize("prefix", ["", "./", "data/", "/home/me/pills/", "C:\\pills\\"])
def test_yolo_lists_of_photos(tmp_path, encoding, prefix):
    labels = {"images/train/약1": f"0 {BOX}", "images/train/a2": f"0 {BOX}", "images/val/a1": f"0 {BOX}"}
    root = yolo(tmp_path, "path: ./\ntrain: train.txt\nval: [val.txt]\nnames: {0: red}\n", labels)
    separator = "\\" if "\\" in prefix else "/"
    for split in ("train", "val"):
        lines = [f"{prefix}{name.replace('/', separator)}.jpg" for name in labels if f"/{split}/" in name]
        text(root / f"{split}.txt", "\n".join(lines), encoding)
    result = read_all(root)
    assert sorted(pill.official_split for pill in result.records) == ["train", "train", "val"]
    assert said(result, "names in train.txt begin with something that is not here") == (prefix not in ("", "./"))
    assert not result.quarantined and result.summary()["files"]["found"] == 6


def test_yolo_what_lists_leave_out_or_name_wrongly_is_counted(tmp_path):
    labels = {f"images/{name}": f"0 {BOX}" for name in "abcd"}
    root = yolo(tmp_path, "train: train.txt\nval: val.txt\nnames: [red]\n", labels)
    text(root / "train.txt", "images/a.jpg\nimages/gone.jpg\nsite/b.jpg\nother/b.jpg\n")
    text(root / "val.txt", "images/a.jpg\nimages/c.jpg\n")
    result = read_all(root)
    assert {Path(pill.image).stem: pill.official_split for pill in result.records} == {"a": "train", "c": "val"}
    assert result.quarantined_by_reason() == {"image_missing": 3}  # two names lead to b, and one nowhere
    assert result.summary()["skipped"] == {"photo_not_listed": 4}  # b and d with their labels
    assert said(result, "val.txt lists 1 photos of another split, such as a.jpg")


def test_cvat_export_without_yaml(tmp_path):
    for number in range(3):
        photo(tmp_path / f"obj_train_data/{number}.jpg", number)
        text(tmp_path / f"obj_train_data/{number}.txt", f"{number % 2} {BOX}")
    text(tmp_path / "obj.names", "red\ngreen\n")
    text(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    text(tmp_path / "train.txt", "".join(f"data/obj_train_data/{number}.jpg\n" for number in range(3)))
    result = read_all(tmp_path)
    assert sorted(pill.code for pill in result.records) == ["green", "red", "red"] and not result.quarantined


# Label Studio and labelImg


def test_label_studio_yolo(tmp_path):
    root = yolo(tmp_path, "", {f"images/ab{number}-p": f"{number % 2} {BOX}" for number in range(4)})
    (root / "data.yaml").unlink()
    text(root / "classes.txt", "red\n빨강\n", "cp949")
    text(root / "notes.json", json.dumps({"categories": [{"id": 0, "name": "red"}], "info": {"year": 2026}}))
    assert choose_layout("auto", root) == "yolo"
    result = read_all(root)
    assert sorted({pill.code for pill in result.records}) == ["red", "빨강"] and len(result.records) == 4
    assert said(result, "there is no data.yaml: classes.txt names the drugs")


def test_photos_labels_and_names_in_one_folder(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / split / "1.jpg", len(split))
        text(tmp_path / split / "1.txt", f"1 {BOX}")
    text(tmp_path / "classes.txt", "red\n\ngreen\n")
    result = read_all(tmp_path)
    assert [(pill.official_split, pill.code) for pill in result.records] == [("train", "class 1"), ("val", "class 1")]


def test_class_folders_with_a_list_of_names_stay_class_folders(tmp_path):
    for name in ("red", "green"):
        photo(tmp_path / name / "1.jpg", len(name))
    text(tmp_path / "classes.txt", "red\ngreen\n")
    assert choose_layout("auto", tmp_path) == "folders"


@pytest.mark.parametrize("name", ["result.json", "_annotations.coco.json", "annotations/train.json"])
def test_label_studio_coco_of_windows(tmp_path, name):
    names = ["images\\1.jpg", "images/2.jpg", ".\\images\\3.jpg", "images\\7\\4.jpg", "..\\..\\media\\upload\\4\\5.jpg"]
    names += ["/data/local-files/?d=pills/images/6.jpg", "C:\\pills\\images\\7.jpg", "one\\8.jpg", "two\\8.jpg"]
    for number in range(1, 9):
        photo(tmp_path / f"images/{number}.jpg", number)
    boxes = [{"category_id": 0} for _ in names]
    coco(tmp_path / name, [{"file_name": entry} for entry in names], boxes, [(0, "red")])
    result = read_all(tmp_path)
    assert sorted(Path(pill.image).stem for pill in result.records) == ["1", "2", "3", "4", "6", "7"]
    assert result.quarantined_by_reason() == {"image_missing": 3}
    assert "which leaves the folder of the dataset" in result.quarantined[0].detail
    assert said(result, "3 names", "begin with something that is not here")
    assert said(result, "3 names in", "lead to no photo, such as '..", "5.jpg")
    assert result.summary()["skipped"] == {"photo_without_label": 2}


def test_photos_whose_labels_have_a_prefix_of_label_studio(tmp_path):
    names = {"3f2a1b4c-a": "a", "00000001-b": "b", "00000002-b": "b"}  # two uploads of the name b
    for number, name in enumerate(dict.fromkeys(names.values())):
        for layout in ("yolo", "coco"):
            photo(tmp_path / layout / f"images/{name}.jpg", number)
    for name in names:
        text(tmp_path / f"yolo/labels/{name}.txt", f"0 {BOX}")
    text(tmp_path / "yolo/classes.txt", "red\n")
    images, boxes = [{"file_name": f"images\\{name}.jpg"} for name in names], [{"category_id": 0} for _ in names]
    coco(tmp_path / "coco/result.json", images, boxes, [(0, "red")])
    for layout, reason in (("yolo", {"image_missing": 2}), ("coco", {"image_missing": 2})):
        result = read_all(tmp_path / layout)
        assert [Path(pill.image).stem for pill in result.records] == ["a"] and result.quarantined_by_reason() == reason
        assert said(result, "3f2a1b4c-a")


def test_coco_in_code_page_949(tmp_path):
    photo(tmp_path / "images/약.jpg")
    path = coco(tmp_path / "result.json", [{"file_name": "images/약.jpg"}], [{"category_id": 0}], [(0, "빨강")])
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp949"))
    assert [pill.code for pill in read_all(tmp_path).records] == ["빨강"]


def test_labels_of_single_photos_are_no_coco_file(tmp_path):
    """They have the same lists, but one category for all drugs."""
    for drug in ("K-000001", "K-000002"):
        photo(tmp_path / f"{drug}_0.jpg", int(drug[2:]))
        content = {"images": [{"drug_N": drug, "file_name": f"{drug}_0.jpg"}], "annotations": [{"bbox": BBOX}]}
        text(tmp_path / f"{drug}_0.json", json.dumps(content | {"categories": [{"id": 1, "name": "Drug"}]}))
    with pytest.raises(DataError, match="looks like no known dataset"):
        choose_layout("auto", tmp_path)


# Labels where people put them


def test_labels_beside_photos_and_in_folders_of_their_own(tmp_path):
    places = {
        "site_a/images/1": "site_a/images/1",
        "site_b/images/2": "site_b/labels/2",
        "site_c/3": "site_c/labels/3",
        "site_d/photos/4": "site_d/labels/4",
        "site_e/train/5": "site_e/labels/train/5",
        "site_f/Images/6": "site_f/Labels/6",
    }
    for number, (name, label) in enumerate(places.items()):
        photo(tmp_path / f"{name}.jpg", number)
        text(tmp_path / f"{label}.txt", f"{number % 2} {BOX}")
    folders = ", ".join(name.rpartition("/")[0] for name in places)
    text(tmp_path / "data.yaml", f"train: [{folders}]\nnames: [red, green]\n")
    result = read_all(tmp_path)
    assert len(result.records) == 6 and not result.quarantined and not result.notes
    assert result.summary()["files"] == {"found": 12, "used": 12, "skipped": 0, "quarantined": 0}


def test_two_labels_of_one_photo(tmp_path):
    root = yolo(tmp_path, "train: images\nnames: [red, green]\n", {"images/1": f"0 {BOX}", "images/2": f"0 {BOX}"})
    text(root / "images/1.txt", f"0 {BOX}\n")
    text(root / "images/2.txt", f"1 {BOX}\n")
    result = read_all(root)
    assert result.quarantined_by_reason() == {"label_duplicate": 1} and result.skipped["repeated_label"] == 1
    assert [Path(pill.image).name for pill in result.records] == ["1.jpg"]


def test_a_label_that_two_photos_may_have_is_used_for_none(tmp_path):
    for number, folder in enumerate(("a", "b")):
        photo(tmp_path / folder / "1.jpg", number)
    text(tmp_path / "labels/1.txt", f"0 {BOX}")
    text(tmp_path / "data.yaml", "train: [a, b]\nnames: [red]\n")
    result = read_all(tmp_path)
    assert result.quarantined_by_reason() == {"label_duplicate": 3} and not result.records


def test_what_is_not_read_is_named(tmp_path):
    root = yolo(tmp_path, "train: [images, more/images]\nnames: [red]\n", {"images/1": f"0 {BOX}"})
    for number in range(3):
        photo(root / f"more/images/{number}.jpg", number)
        photo(root / f"elsewhere/{number}.jpg", number)
    text(root / "more/images/0.xml", "<annotation/>")
    text(root / "images/notes.txt", "taken on a kitchen table")
    text(root / "images/2.txt", f"0 {BOX}")
    result = read_all(root)
    assert said(result, "none of the 3 photos in", "more/images has a label")
    assert said(result, "1 photos have labels in another form, such as 0.xml")
    assert said(result, "3 photos in", "are not read, such as elsewhere/0.jpg")
    assert result.summary()["skipped"] == {"other_file": 2, "photo_without_label": 3}
    assert result.quarantined_by_reason() == {"image_missing": 1}


@pytest.mark.parametrize("layout", ["yolo", "coco", "folders"])
def test_a_drug_that_loses_all_of_its_photos_is_named(tmp_path, layout):
    names = ["red", "green", "blue"]
    for number, name in enumerate(names):
        path = photo(tmp_path / (f"{name}/1.jpg" if layout == "folders" else f"images/{number}.jpg"), number)
        if name == "blue":
            path.write_bytes(b"no picture")
        if layout == "yolo":
            text(tmp_path / f"labels/{number}.txt", f"{number} {BOX}")
    if layout == "yolo":
        text(tmp_path / "data.yaml", "train: images\nnames: [red, green, blue, yellow]\n")
    if layout == "coco":
        images, boxes = [{"file_name": f"images/{n}.jpg"} for n in range(3)], [{"category_id": n} for n in range(3)]
        coco(tmp_path / "result.json", images, boxes, [*enumerate(names), (3, "yellow")])
    result = read_all(tmp_path)
    assert result.missed - {pill.code for pill in result.records} == {"blue"} and len(result.records) == 2


def test_a_drug_whose_labels_have_no_photos_is_named(tmp_path):
    root = yolo(tmp_path, "train: images\nnames: [red, blue]\n", {"images/1": f"0 {BOX}"})
    text(root / "labels/2.txt", f"1 {BOX}")
    assert read_all(root).missed >= {"blue"}


def test_labels_in_a_form_that_is_not_read(tmp_path):
    photo(tmp_path / "photos/1.jpg")
    text(tmp_path / "photos/1.xml", "<annotation/>")
    with pytest.raises(DataError, match="labels in another form, such as 1.xml: export or convert them"):
        read_all(tmp_path)


def test_yolo_photos_that_are_still_packed(tmp_path):
    text(tmp_path / "data.yaml", "train: train/images\nnames: [red]\n")
    (tmp_path / "train.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="unpack train.zip first, or write its path"):
        read_all(tmp_path)


def test_a_photo_folder_that_comes_later_is_noticed_in_the_next_scan(tmp_path):
    root = yolo(tmp_path / "set", "train: images\nnames: [red]\n", {"images/1": f"0 {BOX}"})
    assert not scan(root, tmp_path / "out.parquet").notes
    photo(root / "elsewhere/1.jpg", 7)
    assert "elsewhere/1.jpg" in scan(root, tmp_path / "out.parquet").notes[0]


# Orientation


@pytest.mark.parametrize(
    ("orientation", "size", "stated", "expected"),
    [
        (5, (80, 60), (80, 60), (5, 10, 35, 30)),
        (6, (80, 60), (80, 60), (25, 10, 55, 30)),
        (7, (80, 60), (80, 60), (25, 50, 55, 70)),
        (8, (80, 60), (80, 60), (5, 50, 35, 70)),
        (6, (80, 60), (60, 80), (10, 5, 30, 35)),
        (1, (80, 60), (80, 60), (10, 5, 30, 35)),
        (6, (80, 60), (160, 120), "size_mismatch"),
        (1, (80, 60), (60, 80), "size_mismatch"),
        (6, (60, 60), (60, 60), "orientation_unknown"),
        (3, (80, 60), (80, 60), "orientation_unknown"),
        (2, (80, 60), (80, 60), "orientation_unknown"),
        (6, (80, 60), (None, None), "orientation_unknown"),
    ],
)
def test_coco_boxes_of_photos_with_an_orientation(tmp_path, orientation, size, stated, expected):
    photo(tmp_path / "train/1.jpg", 0, orientation, size)
    images = [{"file_name": "1.jpg", "width": stated[0], "height": stated[1]}]
    boxes = [{"category_id": 1, "bbox": [10, 5, 20, 30]}]
    coco(tmp_path / "train/_annotations.coco.json", images, boxes, [(1, "aspirin")])
    result = read_all(tmp_path)
    if isinstance(expected, str):
        assert result.quarantined_by_reason() == {expected: 1}
    else:
        assert corners(result) == [expected]
        assert said(result, "1 photos carry an EXIF orientation") == (expected[0] != 10)


def test_yolo_photos_with_an_orientation_are_named(tmp_path):
    root = yolo(tmp_path, "train: images\nnames: [red]\n", {"images/1": f"0 {BOX}"})
    photo(root / "images/1.jpg", 0, 6)
    result = read_all(root)
    assert corners(result) == [(22.5, 20, 37.5, 60)] and said(result, "1 photos carry an EXIF orientation")


# Archives


def packed(root: Path) -> Path:
    """Two drugs of the AI Hub collection in archives."""
    for content, letter, suffix in (("images", "S", "png"), ("labels", "L", "json")):
        path = root / "train" / content / f"T{letter}_1_단일.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(8):
                code = f"K-{number % 2 + 1:06}"
                stem = f"{code}_0_{number // 2}_0_0_60_000_200"
                label = {"images": [{"drug_N": code, "width": 80, "height": 60}], "annotations": [{"bbox": BBOX}]}
                data = photo(root / "photo.png", number).read_bytes() if content == "images" else json.dumps(label)
                archive.writestr(f"{code}{'' if content == 'images' else '_json'}/{stem}.{suffix}", data)
    (root / "photo.png").unlink()
    return root


@pytest.mark.parametrize("endings", [("part0", "part500", "part1000"), ("001", "002", "003")])
def test_parts_of_an_archive_are_named_with_the_command_that_joins_them(tmp_path, endings, settings_for):
    root = packed(tmp_path / "set of parts")
    archive = root / "train/images/TS_1_단일.zip"
    data = archive.read_bytes()
    archive.unlink()
    for ending, start in zip(endings, (0, 500, 1000)):
        stop = None if ending == endings[-1] else start + 500
        archive.with_name(f"{archive.name}.{ending}").write_bytes(data[start:stop])
    result = read_all(root)
    assert result.quarantined_by_reason() == {"archive_in_parts": 3, "image_missing": 8}
    with pytest.raises(DataError, match="TS_1_단일.zip in .* lies there in 3 parts that were not joined") as caught:
        prepare_data(settings_for(), root)
    subprocess.run(["bash", "-c", str(caught.value).split("`")[1]], check=True)
    assert archive.read_bytes() == data
    result = read_all(root)
    assert len(result.records) == 8 and not result.quarantined and result.summary()["skipped"] == {"other_file": 3}


def test_the_last_part_of_a_split_archive_is_named_with_the_command_too(tmp_path):
    root = packed(tmp_path)
    archive = root / "train/images/TS_1_단일.zip"
    data = bytearray(archive.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 4], data[end + 6] = 1, 1  # number of this part, and of the one with the table of contents
    archive.write_bytes(data)
    archive.with_name("TS_1_단일.z01").write_bytes(b"PK")
    result = read_all(root)
    assert result.quarantined_by_reason() == {"archive_damaged": 1, "archive_in_parts": 1, "image_missing": 8}
    assert said(result, "lies there in", "zip -s 0 'TS_1_단일.zip' --out 'TS_1_단일_whole.zip'")


def test_parts_beside_nothing_else_are_found(tmp_path):
    for number in range(2):
        text(tmp_path / f"TS_1.zip.part{number}", "x")
    assert read_all(tmp_path).quarantined_by_reason() == {"archive_in_parts": 2}


def test_an_export_that_nobody_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "pills v1.zip", "w") as archive:
        archive.writestr("data.yaml", "train: train/images\nnames: [red]\n")
        archive.writestr("train/images/1.jpg", photo(tmp_path / "elsewhere" / "1.jpg").read_bytes())
        archive.writestr("train/labels/1.txt", f"0 {BOX}")
    with pytest.raises(DataError, match=r"the archive pills v1.zip, .* unpack it first \(`unzip -n ") as caught:
        read_all(tmp_path)
    assert str(tmp_path / "pills v1") in str(caught.value)


def test_labels_without_names_of_their_drugs(tmp_path):
    root = yolo(tmp_path, "", {"images/1": f"0 {BOX}"})
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="no data.yaml and no classes.txt: write the names of their drugs there"):
        read_all(root)


# One class


def test_one_drug_is_enough_for_a_detector_alone(tmp_path, settings_for):
    labels = {f"images/{split}/{n}": f"0 {BOX}\n0 0.2 0.2 0.1 0.1" for split in ("train", "val") for n in range(6)}
    data = "path: medical-pills\ntrain: images/train\nval: images/val\nnames:\n  0: pill\n"
    root = yolo(tmp_path, data, labels)
    dataset = prepare_data(settings_for("train.only=detector"), root)
    assert dataset.class_map.codes == ("pill",) and dataset.report["photos_by_split"]["train"] == 6
    with pytest.raises(DataError, match="Only 1 class is left to train on .*, and a classifier needs two"):
        prepare_data(settings_for(), root)
