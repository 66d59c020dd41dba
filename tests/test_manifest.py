"""Manifest: COCO files and class folders, stable class numbers, leakage across splits, and large tables."""

from __future__ import annotations

import json
import os
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import polars as pl
import pytest
from PIL import Image

from pillsnap.answer.classes import ClassMap, Drug
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data import manifest as manifest_module
from pillsnap.data.manifest import load_dataset, prepare_data, save_dataset
from pillsnap.data.readers.layouts import choose_layout, read_all
from pillsnap.data.reading.photo_files import decode_photo
from pillsnap.data.reading.records import DataError, ScanError
from pillsnap.data.scan.scan import scan
from pillsnap.data.splits import fingerprints
from pillsnap.data.splits.fingerprints import fingerprint_photos
from pillsnap.data.splits.leakage import check_no_leakage, find_leaks, to_leave_out
from pillsnap.data.splits.sampling import photo_table
from pillsnap.data.splits.splits import assign_splits, choose_run_classes, sample_run, split_run


@pytest.fixture
def settings_for(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a plain machine with a cache of their own; scans run in this process."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(manifest_module, "scan", partial(scan, workers=1))
    return lambda *overrides: load_settings(profile="cpu", overrides=[f"paths.cache_root={cache}", *overrides])


def synthetic_image(name: str, width: int = 240, height: int = 180) -> np.ndarray:
    """A smooth scene with a few spots, unique for its name; blue, green, red."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scene = cv2.resize(
        rng.uniform(60, 200, (6, 8, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    for x, y, size in rng.uniform((20, 20, 6), (width - 20, height - 20, 20), (4, 3)).astype(int):
        cv2.ellipse(
            scene,
            ((int(x), int(y)), (2 * int(size), int(size)), float(rng.uniform(0, 180))),
            rng.uniform(0, 255, 3).tolist(),
            -1,
        )
    return np.clip(scene + rng.normal(0, 2, scene.shape), 0, 255).astype(np.uint8)


def write_image(path: Path, image: np.ndarray | None = None, quality: int = 95) -> Path:
    """Save an image; by default a synthetic one that is unique for the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(
        str(path),
        synthetic_image("/".join(path.parts[-3:])) if image is None else image,
        [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else [],
    )
    return path


def class_folders(root: Path, drugs: dict[str, int], part: str = "train") -> Path:
    """Photos in one folder per drug, numbered anew in each."""
    for drug, count in drugs.items():
        for number in range(count):
            write_image(root / part / drug / f"{number}.jpg")
    return root


def coco(
    path: Path,
    entries: list[tuple[str, list]],
    categories: tuple[str, ...] = ("pills", "aspirin", "biotin"),
    size: tuple[int, int] = (240, 180),
) -> dict:
    """Write a JSON of boxes: entries of file name and (category, box) pairs; returns its content."""
    images = [
        {"id": number, "file_name": name, "width": size[0], "height": size[1]}
        for number, (name, _) in enumerate(entries)
    ]
    boxes = [(number, category, box) for number, (_, own) in enumerate(entries) for category, box in own]
    annotations = [
        {"id": count, "image_id": image, "category_id": category, "bbox": box}
        for count, (image, category, box) in enumerate(boxes)
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "supercategory": "none"} for number, name in enumerate(categories)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return content


BOX = [100.0, 60.0, 40.0, 30.0]


def exported(root: Path, train: int = 8) -> Path:
    """A dataset with `_annotations.coco.json` in each split: two drugs, and one photo with both."""
    for part, count in (("train", train), ("valid", 3)):
        names = [f"{drug}{number}.jpg" for drug in (1, 2) for number in range(count)]
        for name in [*names, "both.jpg"]:
            write_image(root / part / name)
        coco(
            root / part / "_annotations.coco.json",
            [(name, [(int(name[0]), BOX)]) for name in names] + [("both.jpg", [(1, BOX), (2, [10, 10, 20, 20])])],
        )
    return root


# COCO


def test_coco_becomes_a_dataset(tmp_path, settings_for):
    dataset = prepare_data(settings_for(), exported(tmp_path))
    assert dataset.report["format"] == "coco" and dataset.class_map.codes == ("aspirin", "biotin")
    assert dataset.report["photos_by_split"] == {
        "train": 17,
        "validation": 7,
        "test": 0,
        "unseen": 0,
        "left_out": 0,
        "not_drawn": 0,
    }
    pills = dataset.manifest.filter(pl.col("photo_kind") == "combination", pl.col("split") == "train")
    assert pills.select("code", "x1", "y1", "x2", "y2").rows() == [
        ("aspirin", 100, 60, 140, 90),
        ("biotin", 10, 10, 30, 30),
    ]
    assert set(dataset.manifest["source"]) == {"coco"} and dataset.manifest["bytes"].min() > 0


@pytest.mark.parametrize("photos", ["images/train2017", "train2017", "images", "."])
def test_coco_with_annotations_apart(tmp_path, photos):
    write_image(tmp_path / photos / "000000000001.jpg")
    coco(tmp_path / "annotations" / "instances_train2017.json", [("000000000001.jpg", [(1, BOX)])])
    (record,) = read_all(tmp_path).records
    assert (record.official_split, record.code, record.image) == (
        "train",
        "aspirin",
        str(tmp_path / photos / "000000000001.jpg"),
    )


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"bbox": []}, "box_missing"),
        ({"bbox": None}, "box_missing"),
        ({"bbox": ["x", 1, 2, 3]}, "box_missing"),
        ({"bbox": [5, 5, 0, 9]}, "box_missing"),
        ({"bbox": [230, 5, 40, 9]}, "box_outside"),
        ({"bbox": [-9, 5, 40, 9]}, "box_outside"),
        ({"bbox": [5, 5, float("inf"), 9]}, "box_outside"),
        ({"category_id": 9}, "class_unknown"),
        ({"category_id": "pill"}, "box_missing"),
        ({"iscrowd": 1}, "box_missing"),
    ],
)
def test_coco_one_bad_box_quarantines_the_photo(tmp_path, annotation, reason):
    path = exported(tmp_path) / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][-1] |= annotation
    path.write_text(json.dumps(content))
    result = read_all(tmp_path)
    assert result.summary()["quarantined"] == {reason: 1} and result.quarantined[0].image == str(
        tmp_path / "train" / "both.jpg"
    )


def test_coco_entries_without_files_and_files_without_entries(tmp_path):
    path = exported(tmp_path) / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["images"] += [
        {"id": 90, "file_name": "gone.jpg"},
        {"id": 91, "file_name": "../valid/10.jpg"},
        {"id": 92, "file_name": "10.jpg"},
        {"id": 93},
        {"id": 94, "file_name": "twice.jpg"},
        {"id": 94, "file_name": "again.jpg"},
        {"id": 95, "file_name": "scaled.jpg", "width": 480, "height": 360},
        {"id": 96, "file_name": "header.jpg"},
        {"id": 97, "file_name": "without.jpg"},
    ]
    content["annotations"] += [
        {"id": 900, "image_id": 555, "category_id": 1, "bbox": BOX},
        {"id": 901, "image_id": 91, "category_id": 1, "bbox": BOX},
    ]
    path.write_text(json.dumps(content))
    for name in ("twice", "again", "scaled", "without", "unlisted"):
        write_image(tmp_path / "train" / f"{name}.jpg")
    (tmp_path / "train" / "header.jpg").write_bytes(b"no picture")
    (tmp_path / "README.txt").write_text("exported")
    summary = read_all(tmp_path).summary()
    assert summary["quarantined"] == {"image_damaged": 1, "image_missing": 3, "label_duplicate": 4, "size_mismatch": 1}
    assert summary["skipped"] == {"other_file": 1, "photo_without_label": 1, "photo_without_pills": 1}
    assert summary["files"] == {"found": 33, "used": 26, "skipped": 3, "quarantined": 4}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"images": [], "annotations": []}',
        b'{"images": [7], "annotations": [], "categories": []}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"images": [{"id": [1]}], "annotations": [], "categories": []}',
    ],
)
def test_coco_invalid_file_is_one_error_message(tmp_path, content):
    (exported(tmp_path) / "train" / "_annotations.coco.json").write_bytes(content)
    with pytest.raises(
        ScanError, match="cannot be read as a COCO file .*: it needs the lists images, annotations and categories"
    ):
        read_all(tmp_path)


def test_coco_photos_outside_of_the_dataset_are_quarantined(tmp_path):
    path = exported(tmp_path / "set") / "train" / "_annotations.coco.json"
    write_image(tmp_path / "elsewhere.jpg")
    content = json.loads(path.read_text())
    content["images"] += [
        {"id": 90, "file_name": "../../elsewhere.jpg"},
        {"id": 91, "file_name": str(tmp_path / "elsewhere.jpg")},
    ]
    path.write_text(json.dumps(content))
    summary = read_all(tmp_path / "set").summary()
    assert summary["quarantined"] == {"image_missing": 2} and summary["files"]["quarantined"] == 0


def test_coco_unicode_nfd_names_match_their_photos(tmp_path):
    coco(tmp_path / "_annotations.coco.json", [("약.jpg", [(1, BOX)])])
    write_image(tmp_path / unicodedata.normalize("NFD", "약.jpg"))
    assert len(read_all(tmp_path).records) == 1


def test_copies_under_one_name_are_left_out_by_their_pictures(tmp_path, settings_for):
    root = exported(tmp_path)
    picture = synthetic_image("pill")
    for part, letters, altered in (
        ("train", "aaa", picture),
        ("valid", "bbb", cv2.add(picture, np.full_like(picture, 8))),
    ):
        content = coco(root / part / "more.json", [(f"pill_jpg.rf.{letters}.jpg", [(1, BOX)])])
        path = root / part / "_annotations.coco.json"
        known = json.loads(path.read_text())
        known["images"].append(content["images"][0] | {"id": 99})
        known["annotations"].append(content["annotations"][0] | {"id": 99, "image_id": 99})
        path.write_text(json.dumps(known))
        write_image(root / part / f"pill_jpg.rf.{letters}.jpg", altered)
    assert prepare_data(settings_for(), root).report["left_out"] == {"twin_in_earlier_split": 1}


# Class folders


def test_class_folders_become_a_dataset(tmp_path, settings_for):
    root = class_folders(
        class_folders(tmp_path, {"aspirin": 6, "biotin": 6}), {"aspirin": 2, "biotin": 2, "cetirizine": 1}, "valid"
    )
    dataset = prepare_data(settings_for(), root)
    assert dataset.report["format"] == "folders" and dataset.class_map.codes == ("aspirin", "biotin")
    assert (
        dataset.report["photos_by_split"]["train"] == 12 and dataset.report["photos_by_split"]["validation"] == 4
    )  # the same file names in both, and no leakage
    assert dataset.report["left_out"] == {"class_without_training_photo": 1}
    assert dataset.manifest.select(pl.col("x1", "y1").max(), pl.col("x2").min(), pl.col("y2").min()).row(0) == (
        0,
        0,
        240,
        180,
    )
    assert any(
        "have no boxes: the whole photo counts as one pill" in sentence for sentence in dataset.report["shortfalls"]
    )


def test_class_folders_without_split_are_held_out_by_photo(tmp_path, settings_for):
    dataset = prepare_data(settings_for(), class_folders(tmp_path, {"aspirin": 9, "biotin": 9}, "."))
    assert all(dataset.report["photos_by_split"][split] for split in ("train", "validation", "test"))


PHONES = {"a": ("HEIC", "HEIF"), "b": ("jpg", "HEIF"), "c": ("avif", "AVIF"), "d": ("tif", "TIFF")}
PHONES |= {"e": ("jfif", "JPEG"), "f": ("gif", "GIF"), "g": ("webp", "WEBP")}


def test_no_drug_is_lost_for_the_format_of_its_photos(tmp_path, settings_for):
    pillow_heif.register_heif_opener()
    for drug, (suffix, kind) in PHONES.items():
        for number in range(4):
            path = write_image(tmp_path / "train" / drug / f"{number}.png")
            exif = Image.Exif()
            exif[0x0112] = 6
            turned = {} if kind == "GIF" else {"exif": exif.tobytes()}
            Image.open(path).save(path.with_suffix(f".{suffix}"), kind, **turned)
            path.unlink()
    dataset = prepare_data(settings_for(), tmp_path)
    assert dataset.class_map.codes == tuple(PHONES) and dataset.report["left_out"] == {}
    assert sum(dataset.report["photos_by_split"].values()) == 28
    for image, width, height, x2, y2 in dataset.manifest.select("image", "width", "height", "x2", "y2").iter_rows():
        assert (x2, y2) == (width, height) == ((240, 180) if "/f/" in image else (180, 240))
        assert decode_photo(image).pixels.shape == (height, width, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF", "AVIF"])
def test_half_a_photo_is_damaged(tmp_path, kind):
    pillow_heif.register_heif_opener()
    path = write_image(tmp_path / "1.png")
    Image.open(path).save(path, kind)
    assert fingerprints.fingerprint_photo(str(path))[3] == ""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + {"JPEG": b"\xff\xd9", "PNG": whole[-12:]}.get(kind, b""))
    reference, _, perceptual_hash, damaged = fingerprints.fingerprint_photo(str(path))
    assert perceptual_hash == "" and damaged.startswith(reference) and "damaged" in damaged


def test_class_folders_account_for_every_file(tmp_path):
    root = class_folders(tmp_path, {"aspirin": 2, "biotin": 2})
    (root / "train" / "aspirin" / "header.jpg").write_bytes(b"")
    (root / "train" / "aspirin" / "notes.txt").write_text("x")
    (root / "train" / "stray.jpg").write_bytes((root / "train" / "aspirin" / "0.jpg").read_bytes())
    with open(os.fsencode(root) + b"/train/aspirin/caf\xe9.jpg", "wb") as file:
        file.write((root / "train" / "aspirin" / "1.jpg").read_bytes())
    summary = read_all(root).summary()
    assert summary["quarantined"] == {"image_damaged": 1, "name_unreadable": 1}
    assert summary["skipped"] == {"other_file": 1, "outside_class_folders": 1} and summary["files"]["found"] == 8


@pytest.mark.parametrize(
    "names", [["images", "labels"], ["K-000001", "K-000002"], ["K-000001_json", "other"], ["only one"]]
)
def test_folders_of_other_layouts_are_not_taken_for_classes(tmp_path, names):
    class_folders(tmp_path, dict.fromkeys(names, 1), ".")
    with pytest.raises(DataError, match="looks like no known dataset"):
        choose_layout("auto", tmp_path)


def test_other_layouts_win_over_class_folders(tmp_path):
    root = class_folders(exported(tmp_path), {"aspirin": 1, "biotin": 1})
    assert choose_layout("auto", root) == "coco"


# Class numbers


def test_an_extended_class_map_keeps_its_numbers(tmp_path, settings_for):
    first = prepare_data(
        settings_for(), class_folders(tmp_path / "first", {"biotin": 6, "cetirizine": 6, "doxycycline": 6})
    )
    save_dataset(first, tmp_path / "run")
    root = class_folders(tmp_path / "second", {"aspirin": 6, "biotin": 6, "cetirizine": 6})
    later = prepare_data(settings_for(f"data.class_map={tmp_path / 'run' / 'class_map.json'}"), root)
    assert (
        later.class_map.codes == ("biotin", "cetirizine", "doxycycline", "aspirin")
        and later.class_map.hash != first.class_map.hash
    )
    assert dict(later.manifest.select("code", "class_index").unique().rows()) == {
        "aspirin": 3,
        "biotin": 0,
        "cetirizine": 1,
    }
    decisions = {decision.what: decision for decision in later.decisions}
    assert (
        decisions["class map"].reason.endswith("3 keep their numbers, 1 come after them")
        and not decisions["class map"].fallback
    )
    assert decisions["drugs that vanished"].fallback and "doxycycline" in decisions["drugs that vanished"].reason
    save_dataset(later, tmp_path / "later")
    assert load_dataset(tmp_path / "later").class_map == later.class_map


def test_known_drugs_are_chosen_first(tmp_path, settings_for):
    root = class_folders(tmp_path / "set", dict.fromkeys("abcdef", 6))
    sampled = prepare_data(settings_for("data.classes=2"), root).class_map.codes
    known = [Drug(code, code) for code in "abcdef" if code not in sampled][:2]
    (tmp_path / "class_map.json").write_text(json.dumps(ClassMap(known).to_json()))
    assert prepare_data(
        settings_for("data.classes=2", f"data.class_map={tmp_path / 'class_map.json'}"), root
    ).class_map.codes == tuple(drug.code for drug in known)


@pytest.mark.parametrize("content", [None, "{}", "no JSON", json.dumps({"hash": "0", "drugs": []})])
def test_a_class_map_that_cannot_be_extended_is_one_error_message(tmp_path, settings_for, content):
    if content is not None:
        (tmp_path / "class_map.json").write_text(content)
    root = class_folders(tmp_path / "set", {"aspirin": 4, "biotin": 4})
    with pytest.raises(
        DataError,
        match="data.class_map is .*class_map.json, which cannot be used .*: name the class_map.json of an earlier run",
    ):
        prepare_data(settings_for(f"data.class_map={tmp_path / 'class_map.json'}"), root)


# Leakage


def with_copies(root: Path) -> Path:
    """Class folders whose validation split has four copies of training photos, and two photos of its own.

    The copies are exact, re-encoded, smaller and brighter.
    """
    class_folders(root, {"aspirin": 6, "biotin": 6})
    original = [cv2.imread(str(root / "train" / "aspirin" / f"{number}.jpg")) for number in range(4)]
    held = root / "val" / "aspirin"
    write_image(held / "own.jpg")
    write_image(root / "val" / "biotin" / "own.jpg")
    (held / "exact.jpg").write_bytes((root / "train" / "aspirin" / "0.jpg").read_bytes())
    write_image(held / "encoded.jpg", original[1], quality=60)
    write_image(held / "smaller.jpg", cv2.resize(original[2], (160, 120), interpolation=cv2.INTER_AREA))
    write_image(held / "brighter.png", cv2.add(original[3], np.full_like(original[3], 8)))
    return root


def test_copies_of_training_photos_are_left_out_with_their_names(tmp_path, settings_for):
    dataset = prepare_data(settings_for(), with_copies(tmp_path))
    left = dataset.manifest.filter(pl.col("split") == "left_out")
    assert {Path(image).name for image in left["image"]} == {"exact.jpg", "encoded.jpg", "smaller.jpg", "brighter.png"}
    assert (
        dataset.report["left_out"] == {"twin_in_earlier_split": 4} and dataset.report["photos_by_split"]["train"] == 12
    )
    (decision,) = [decision for decision in dataset.decisions if decision.what == "held-out near-duplicates"]
    assert decision.fallback and "1 with identical content, 3 with an almost identical picture" in decision.reason
    assert "val/aspirin/exact.jpg (validation) and train/aspirin/0.jpg (train, 0 of 256 bits differ)" in decision.reason


def test_content_check_finds_the_exact_copy_only_and_off_is_logged(tmp_path, settings_for, monkeypatch):
    root = with_copies(tmp_path)
    read = []
    monkeypatch.setattr(
        fingerprints, "read_photo", lambda reference: read.append(reference) or Path(reference).read_bytes()
    )
    dataset = prepare_data(settings_for("data.leakage_check=content"), root)
    assert dataset.report["left_out"] == {"twin_in_earlier_split": 1} and dataset.manifest[
        "perceptual_hash"
    ].null_count() == len(dataset.manifest)
    assert {Path(reference).name for reference in read} == {
        "0.jpg",
        "exact.jpg",
    }  # only what has its size in another split
    unchecked = prepare_data(settings_for("data.leakage_check=off"), root)
    assert unchecked.report["left_out"] == {} and any(
        "leakage_check=off: nobody looked" in sentence for sentence in unchecked.report["shortfalls"]
    )


def test_sessions_of_the_sample_are_no_near_duplicates(tiny_data, settings_for):
    dataset = prepare_data(settings_for(), tiny_data)
    assert (
        dataset.report["left_out"].get("twin_in_earlier_split") is None
        and dataset.manifest["perceptual_hash"].str.len_chars().eq(64).all()
    )


def test_two_pills_on_one_tray_are_no_near_duplicates(tmp_path):
    """The tray fills the photo, so the hashes are alike; the comparison of pixels finds the difference."""
    rows = []
    tray = (
        cv2.resize(
            np.random.default_rng(1).uniform(0, 255, (12, 16, 3)).astype(np.float32),
            (240, 180),
            interpolation=cv2.INTER_CUBIC,
        )
        .clip(0, 255)
        .astype(np.uint8)
    )
    for split, name, place, colour in (
        ("train", "a", (120, 90), (250, 250, 250)),
        ("test", "moved", (125, 92), (250, 250, 250)),
        ("test", "other colour", (120, 90), (120, 250, 250)),
    ):
        photo = tray.copy()
        cv2.circle(photo, place, 5, colour, -1)
        rows.append((str(write_image(tmp_path / f"{name}.png", photo)), split))
    table = pl.DataFrame(rows, schema=["image", "split"], orient="row").with_columns(bytes=0, group=pl.col("image"))
    table = table.join(fingerprint_photos(table["image"], tmp_path / "remembered.parquet"), on="image")
    near = [fingerprints.distance(table["perceptual_hash"][0], other) for other in table["perceptual_hash"][1:]]
    assert max(near) <= 12 and not len(find_leaks(table))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (pl.col("group").replace_strict({}, default="one session"), "1 capture groups are in two splits"),
        (
            pl.when(pl.col("image").str.ends_with("exact.jpg"))
            .then(pl.lit("validation"))
            .otherwise("split")
            .alias("split"),
            "1 held-out photos .*1 with identical content; such as .*exact.jpg",
        ),
        (
            pl.when(pl.col("image").str.ends_with("smaller.jpg"))
            .then(pl.lit("test"))
            .otherwise("split")
            .alias("split"),
            "1 held-out photos .*1 with an almost identical picture; such as .*smaller.jpg",
        ),
    ],
)
def test_a_manifest_with_a_leak_stops_the_run(tmp_path, settings_for, change, sentence):
    manifest = prepare_data(settings_for(), with_copies(tmp_path)).manifest
    check_no_leakage(manifest)
    with pytest.raises(DataError, match=sentence):
        check_no_leakage(manifest.with_columns(change))


def test_a_candidate_that_cannot_be_read_counts_as_a_near_duplicate(tmp_path, settings_for):
    manifest = prepare_data(settings_for(), with_copies(tmp_path)).manifest
    leak = manifest.with_columns(
        split=pl.when(pl.col("image").str.ends_with("encoded.jpg")).then(pl.lit("test")).otherwise("split")
    )
    (tmp_path / "val" / "aspirin" / "encoded.jpg").unlink()
    with pytest.raises(DataError, match="almost identical picture"):
        check_no_leakage(leak)


def test_one_photo_in_three_splits_stays_in_the_first():
    leaks = pl.DataFrame(
        [
            ("b", "validation", "a", "train"),
            ("c", "test", "a", "train"),
            ("c", "test", "b", "validation"),
            ("e", "test", "d", "validation"),
            ("f", "unseen", "e", "test"),
        ],
        schema=["image", "split", "other", "other_split"],
        orient="row",
    )
    assert to_leave_out(leaks) == ["b", "c", "e"]  # f may stay: its near-duplicate e is left out


def test_flat_and_damaged_photos_are_no_near_duplicates_but_counted(tmp_path, settings_for):
    root = class_folders(tmp_path, {"aspirin": 5, "biotin": 5})
    for part, shade in (("train", 10), ("val", 11)):
        write_image(root / part / "aspirin" / "flat.png", np.full((180, 240, 3), shade, np.uint8))
        (root / part / "biotin").mkdir(parents=True, exist_ok=True)
        (root / part / "biotin" / "cut.jpg").write_bytes(
            (root / "train" / "biotin" / "0.jpg").read_bytes()[: 2000 if part == "train" else 2100]
        )
    dataset = prepare_data(settings_for(), root)
    assert dataset.report["left_out"] == {}
    (damaged,) = [decision for decision in dataset.decisions if decision.what == "photos that cannot be decoded"]
    assert damaged.choice == "2" and damaged.fallback and "biotin/cut.jpg is damaged" in damaged.reason


def test_fingerprints_are_cached_and_renewed(tmp_path, monkeypatch):
    paths = [str(write_image(tmp_path / f"{number}.jpg")) for number in range(6)]
    cache_file = tmp_path / "fingerprints.parquet"
    read: list[str] = []
    inspect = fingerprints.fingerprint_photo
    monkeypatch.setattr(
        fingerprints, "fingerprint_photo", lambda reference, *rest: read.append(reference) or inspect(reference, *rest)
    )
    first = fingerprint_photos(paths[:4], cache_file)
    assert fingerprint_photos(paths, cache_file).head(4).equals(first) and Counter(read) == dict.fromkeys(paths, 1)
    write_image(Path(paths[0]), synthetic_image("another"))
    again = fingerprint_photos(paths, cache_file)
    assert read[6:] == [paths[0]] and again["content_hash"][0] != first["content_hash"][0]
    cache_file.write_bytes(b"half a file")
    assert fingerprint_photos(paths, cache_file).equals(again) and len(read) == 13


def test_fingerprints_survive_an_interruption(tmp_path, monkeypatch):
    paths = [str(write_image(tmp_path / f"{number}.jpg")) for number in range(6)]
    monkeypatch.setattr(fingerprints, "_BLOCK", 2)
    monkeypatch.setattr(fingerprints, "_SAVE_EVERY", 0.0)
    inspect, read = fingerprints.fingerprint_photo, []

    def interrupted(reference, *rest):
        if reference == paths[5]:
            raise KeyboardInterrupt
        read.append(reference)
        return inspect(reference, *rest)

    monkeypatch.setattr(fingerprints, "fingerprint_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fingerprint_photos(paths, tmp_path / "fingerprints.parquet", workers=1)
    monkeypatch.setattr(
        fingerprints, "fingerprint_photo", lambda reference, *rest: read.append(reference) or inspect(reference, *rest)
    )
    fingerprint_photos(paths, tmp_path / "fingerprints.parquet", workers=1)
    assert Counter(read[:4]) == dict.fromkeys(paths[:4], 1) and set(read[-2:]) == set(paths[4:])


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    paths = [str(write_image(tmp_path / f"{number}.jpg")) for number in range(2)]
    (tmp_path / "blocked").write_text("a file where a folder should be")
    assert fingerprint_photos(paths, tmp_path / "blocked" / "fingerprints.parquet")["damaged"].to_list() == ["", ""]
    assert "fingerprints of photos: not kept" in caplog.text


# The run as a whole


def test_the_tiny_dataset_is_the_same_every_time(tiny_data, settings_for, tmp_path):
    first = prepare_data(settings_for("data.images=60"), tiny_data)
    again = prepare_data(settings_for("data.images=60"), tiny_data)
    anew = prepare_data(
        load_settings(profile="cpu", overrides=["data.images=60", f"paths.cache_root={tmp_path}"]), tiny_data
    )
    for other in (again, anew):
        assert (
            other.manifest.equals(first.manifest)
            and other.class_map == first.class_map
            and other.report == first.report
            and other.decisions == first.decisions
        )
    other = prepare_data(settings_for("data.images=60", "seed=7"), tiny_data)
    assert not other.manifest.equals(first.manifest)


def test_the_documented_columns_are_those_of_the_table(tiny_data, settings_for):
    book = json.loads((Path(__file__).parents[1] / "nbs" / "data" / "00_manifest.ipynb").read_text(encoding="utf-8"))
    (table,) = [
        text
        for text in ("".join(cell["source"]) for cell in book["cells"])
        if "| column | type | unit | meaning |" in text
    ]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("|")][2:]
    documented = {name.strip(): kind.strip() for names, kind in rows for name in names.split(",")}
    manifest = prepare_data(settings_for(), tiny_data).manifest
    assert documented == {name: str(kind) for name, kind in manifest.schema.items()}


def test_a_larger_run_contains_the_smaller_one(tiny_data, settings_for):
    no_combinations = "data.combination_fraction=0"
    small, large = (
        prepare_data(settings_for(f"data.images={images}", no_combinations), tiny_data).manifest.filter(
            pl.col("split") != "left_out"
        )
        for images in (30, 90)
    )
    assert small["image"].n_unique() == 30 and set(small["image"]) < set(large["image"])


def test_shortfalls_and_the_unseen_drugs_are_reported(tiny_data, settings_for):
    report = prepare_data(
        settings_for("data.images=4000", "data.classes=9", "data.min_class_images=8"), tiny_data
    ).report
    shortfalls = "\n".join(report["shortfalls"])
    for sentence in (
        "classes left out: ",
        "fewer than 8 training photos (data.min_class_images)",
        "classes: 3 (data.classes asks for 9",
        "small classes taken: 3 (data.class_images asks for 80 photos of each",
        "data.images asks for 4000, the data has no more",
        "combination photos: 24 (data.combination_fraction asks for 30%",
    ):
        assert sentence in shortfalls, shortfalls


def test_synthetic_collection_of_a_quarter_million_photos(settings_for):
    """Sampling and splitting work on tables: a tenth of the whole collection takes a few seconds."""
    classes, sessions, turns = 500, 36, 14
    numbers = pl.int_range(classes * sessions * turns, eager=True)
    table = pl.DataFrame(
        {"drug": numbers // (sessions * turns), "session": numbers // turns % sessions, "turn": numbers % turns}
    )
    code = pl.format("K-{}", pl.col("drug").cast(pl.String).str.zfill(6))
    records = table.select(
        image=pl.format("/set/train/{}/{}_{}_{}.png", code, code, "session", "turn"),
        photo_kind=pl.lit("single"),
        official_split=pl.when(pl.col("drug") < 450).then(pl.lit("train")).otherwise(pl.lit("val")),
        group=pl.format("{}|{}", code, "session"),
        code=code,
        bytes=pl.lit(0, pl.Int64),
        content_hash=pl.lit(""),
    )
    settings = settings_for("data.images=50000", "data.classes=400", "data.combination_fraction=0")
    started = time.monotonic()
    splits = assign_splits(photo_table(records, "/set"), "aihub")
    chosen = choose_run_classes(splits, settings)
    taken = split_run(sample_run(splits, chosen, settings), chosen, settings, splits.decisions)
    assert time.monotonic() - started < 30  # about 2 s alone
    assert len(taken) == 50_000 and taken["photo"].n_unique() == 50_000 and len(chosen) == 400
    counts = (
        taken.filter(pl.col("split") != "unseen")
        .select(pl.col("codes").list.first())
        .to_series()
        .value_counts()["count"]
    )
    assert counts.max() - counts.min() <= 1
    assert taken.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    assert set(taken.filter(pl.col("split") == "unseen")["official_split"]) == {"val"}
