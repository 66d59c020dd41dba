"""Faulty datasets: every fault is reported by an error of one sentence or a reason code."""

from __future__ import annotations

import json
import os
import random
import unicodedata
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from pillsnap.cli import main
from pillsnap.config.load import load_settings
from pillsnap.data import manifest as manifest_module
from pillsnap.data.manifest import load_dataset, prepare_data, save_dataset
from pillsnap.data.readers.aihub_layout import looks_like_aihub
from pillsnap.data.readers.layouts import read_all
from pillsnap.data.reading.records import DataError
from pillsnap.data.scan.scan import scan
from pillsnap.data.splits.group_split import check_groups

ENGLISH = {
    "train": "train",
    "val": "val",
    "images": "images",
    "labels": "labels",
    "single": "single",
    "combination": "combination",
}
KOREAN = {
    "train": "01.데이터/1.Training",
    "val": "01.데이터/2.Validation",
    "images": "원천데이터",
    "labels": "라벨링데이터",
    "single": "단일경구약제 5000종",
    "combination": "경구약제조합 5000종",
}
CODES = ("K-000010", "K-000020", "K-000030")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test scans again, in this process."""
    monkeypatch.setitem(PLACES, "cache", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(manifest_module, "scan", partial(scan, workers=1))


PLACES: dict[str, Path] = {}


def settings_for(*overrides: str):
    """Settings of a machine without GPU."""
    return load_settings(profile="cpu", overrides=[f"paths.cache_root={PLACES['cache']}", *overrides])


def image_of(name: str, size: tuple[int, int] = (97, 128)) -> Image.Image:
    """A grey image of noise, different for each name."""
    return Image.fromarray(
        np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, size[::-1], dtype=np.uint8)
    )


class Collection:
    """A small collection in the AI Hub layout."""

    def __init__(self, root: Path, words: dict[str, str] = ENGLISH, above: str = "") -> None:
        self.root, self.words, self.above = root, words, above

    def folder(self, part: str, kind: str, what: str) -> Path:
        """Photo or label folder of a part."""
        return self.root / self.above / self.words[part] / self.words[what] / self.words[kind]

    def add(
        self,
        *codes: str,
        part: str = "train",
        background: int = 0,
        side: int = 0,
        elevation: int = 60,
        turn: int = 0,
        box=None,
        **facts,
    ):
        """One photo with one label per code; returns the photo and its labels."""
        name = "-".join(["K", *(code[2:] for code in codes)])
        kind = "single" if len(codes) == 1 else "combination"
        stem = f"{name}_0_{background}_{side}_0_{elevation}_{turn:03d}_200"
        photo = self.folder(part, kind, "images") / f"TS_1_{kind}" / name / f"{stem}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        image_of(f"{part} {stem}").save(photo)
        labels = []
        for number, code in enumerate(codes):
            inner = f"{name}_json" if kind == "single" else f"{name}_json/{code}"
            label = self.folder(part, kind, "labels") / f"TL_1_{kind}" / inner / f"{stem}.json"
            label.parent.mkdir(parents=True, exist_ok=True)
            described = {
                "drug_N": code,
                "dl_name": f"약 {code}",
                "width": 97,
                "height": 128,
                "drug_shape": "원형",
            } | facts
            content = {
                "images": [described],
                "annotations": [{"bbox": [5 + 20 * number, 40, 15, 15] if box is None else box, "category_id": 1}],
            }
            label.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            labels.append(label)
        return photo, labels

    def fill(self) -> Collection:
        """Three drugs in twelve sessions each, and combinations of them."""
        for code in CODES:
            for background in (0, 1, 2):
                for side in (0, 1):
                    for elevation in (60, 70, 90):
                        self.add(code, background=background, side=side, elevation=elevation)
        for codes in (CODES, CODES[:2], CODES[1:], CODES[::2]):
            for turn in (0, 20):
                self.add(*codes, turn=turn)
        return self


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    """A collection without faults."""
    return Collection(tmp_path / "set").fill()


def quarantine(root: Path) -> dict[str, int]:
    """Counts by reason; checks the file counts too."""
    scan = read_all(root)
    return scan.summary()["quarantined"]


# The folder itself


def test_missing_root(tmp_path):
    with pytest.raises(DataError, match="There is no folder .*nowhere: set paths.data_root"):
        prepare_data(settings_for(), tmp_path / "nowhere")


def test_root_is_a_file(tmp_path):
    (tmp_path / "set.txt").write_text("x")
    with pytest.raises(DataError, match="is a file: paths.data_root must be the folder"):
        prepare_data(settings_for(), tmp_path / "set.txt")


def test_empty_root(tmp_path):
    with pytest.raises(DataError, match="is empty: put the dataset there"):
        prepare_data(settings_for(), tmp_path)


def test_unknown_layout_lists_the_known_ones(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(
        DataError,
        match="looks like no known dataset. Looked for: a data.yaml .*COCO.*train_images beside train_annotations"
        ".*the archive photos.zip.*: unpack",
    ):
        prepare_data(settings_for(), tmp_path)


def test_forced_format_that_is_not_there(tmp_path, collection):
    with pytest.raises(DataError, match="No YOLO dataset in .*looked for data.yaml"):
        prepare_data(settings_for("data.format=yolo"), collection.root)


def test_nothing_usable_is_counted_by_reason(tmp_path):
    damaged = Collection(tmp_path / "set")
    for turn in (0, 20, 40):
        damaged.add("K-000010", turn=turn, box=[])
    photo, labels = damaged.add("K-000020")
    labels[0].unlink()
    with pytest.raises(
        DataError,
        match="No photo .* can be used: 7 files found as aihub; in quarantine: box_missing 3, label_missing 1",
    ):
        prepare_data(settings_for(), damaged.root)


def test_only_official_validation(tmp_path):
    only = Collection(tmp_path / "set")
    only.add("K-000010", part="val")
    with pytest.raises(DataError, match="no training photo that can be used"):
        prepare_data(settings_for(), only.root)


def test_photos_unpacked_without_labels(tmp_path):
    photo, labels = Collection(tmp_path / "set").add("K-000010")
    labels[0].unlink()
    assert looks_like_aihub(tmp_path / "set")
    with pytest.raises(DataError, match="label_missing 1.*Check that photos and labels are both there"):
        prepare_data(settings_for(), tmp_path / "set")


# Layouts


@pytest.mark.parametrize(
    ("words", "above"),
    [(ENGLISH, ""), (ENGLISH, "data"), (KOREAN, ""), (KOREAN, "166.약품식별 경구약제 이미지 데이터")],
)
def test_layouts_give_the_same_dataset(tmp_path, collection, words, above):
    other = Collection(tmp_path / "other", words, above).fill()
    reference, dataset = prepare_data(settings_for(), collection.root), prepare_data(settings_for(), other.root)
    columns = ["group", "code", "photo_kind", "class_index", "x1"]
    assert dataset.manifest.select(columns).sort(columns).equals(reference.manifest.select(columns).sort(columns))
    assert dataset.class_map.hash == reference.class_map.hash


def test_decomposed_korean_names(tmp_path):
    words = {key: unicodedata.normalize("NFD", name) for key, name in KOREAN.items()}
    Collection(tmp_path / "set", words).fill()
    assert len(prepare_data(settings_for(), tmp_path / "set").class_map) == 3


def test_flat_edition(tmp_path):
    source = Collection(tmp_path / "source")
    for number, codes in enumerate((CODES, CODES[:2], CODES[1:], CODES[::2], CODES, CODES[:2])):
        photo, labels = source.add(*codes, turn=20 * number)
        target = tmp_path / "flat" / "train_images" / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        photo.rename(target)
        for code, label in zip(codes, labels):
            target = tmp_path / "flat" / "train_annotations" / label.parent.parent.name / code / label.name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = json.loads(label.read_text(encoding="utf-8"))
            content["annotations"][0]["category_id"] = int(code[2:]) - 1
            target.write_text(json.dumps(content))
    (tmp_path / "flat" / "test_images").mkdir()
    Image.new("L", (97, 128)).save(tmp_path / "flat" / "test_images" / "1.png")
    dataset = prepare_data(settings_for(), tmp_path / "flat")
    assert dataset.class_map.codes == CODES and dataset.report["photos"] == 6
    assert dataset.report["skipped"] == {"test_image_without_label": 1}


def test_index_images_are_skipped(collection):
    photo, _ = collection.add(*CODES, turn=40)
    photo.with_name("K-000010-000020-000030_index.png").write_bytes(photo.read_bytes())
    assert read_all(collection.root).summary()["skipped"] == {"index_image": 1}


# Labels


def test_label_that_is_not_json(collection):
    _, labels = collection.add("K-000010", turn=40)
    labels[0].write_text("<html>moved</html>")
    assert quarantine(collection.root) == {"label_unreadable": 1}


def test_label_cut_in_half(collection):
    _, labels = collection.add("K-000010", turn=40)
    labels[0].write_bytes(labels[0].read_bytes()[:60])
    assert quarantine(collection.root) == {"label_unreadable": 1}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}"]
)
def test_labels_of_any_bytes_are_refused_not_fatal(collection, content):
    _, labels = collection.add("K-000010", turn=40)
    labels[0].write_bytes(content)
    assert quarantine(collection.root) == {"label_unreadable": 1}


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([], "box_missing"),
        (None, None),
        ([10, 10, 0, 5], "box_missing"),
        (["x", 1, 2, 3], "box_missing"),
        ([10, 10, 5], "box_missing"),
        ([656, 40, 15, 15], "box_outside"),
        ([-30, 40, 15, 15], "box_outside"),
        ([80, 40, 30, 15], "box_outside"),
        ([5, 40, 6567, 15], "box_outside"),
    ],
)
def test_boxes(collection, box, reason):
    collection.add("K-000010", turn=40, box=box)
    assert quarantine(collection.root) == ({} if reason is None else {reason: 1})


def test_one_bad_box_quarantines_the_whole_combination(collection):
    photo, labels = collection.add(*CODES, turn=40)
    content = json.loads(labels[1].read_text(encoding="utf-8"))
    content["annotations"][0]["bbox"] = [6567, 40, 15, 15]
    labels[1].write_text(json.dumps(content))
    scan = read_all(collection.root)
    assert scan.quarantined_by_reason() == {"box_outside": 1} and str(photo) not in {
        record.image for record in scan.records
    }


def test_cp949_label(collection):
    photo, labels = collection.add("K-000010", turn=40, dl_name="예시정 10밀리그램")
    labels[0].write_bytes(labels[0].read_text(encoding="utf-8").encode("cp949"))
    records = {record.image: record for record in read_all(collection.root).records}
    assert records[str(photo)].name == "예시정 10밀리그램"


def test_null_fields_and_numbers_as_text(collection):
    nulls = dict.fromkeys(
        (
            "dl_name",
            "dl_company",
            "di_edi_code",
            "print_front",
            "print_back",
            "color_class1",
            "color_class2",
            "drug_shape",
            "camera_la",
            "back_color",
        )
    )
    photo, _ = collection.add(
        "K-000010",
        turn=40,
        box=["5", 40.0, "15", 15],
        **nulls | {"width": "97", "height": 128.0, "item_seq": "200012345"},
    )
    record = {record.image: record for record in read_all(collection.root).records}[str(photo)]
    assert (record.name, record.edi_codes, record.shape, record.width, record.x2, record.elevation) == (
        "",
        (),
        "",
        97,
        20.0,
        60,
    )
    assert prepare_data(settings_for(), collection.root).class_map[0].name == "약 K-000010"


def test_size_missing_in_the_label_is_read_from_the_header(collection):
    photo, _ = collection.add("K-000010", turn=40, width=None, height="")
    broken, _ = collection.add("K-000010", turn=60, width=None)
    broken.write_bytes(b"no picture")
    scan = read_all(collection.root)
    assert scan.quarantined_by_reason() == {"image_damaged": 1}
    assert {(record.width, record.height) for record in scan.records} == {(97, 128)}


def test_code_from_the_other_field_or_the_folder(collection):
    collection.add("K-000010", turn=40, drug_N=None, dl_mapping_code="K-000010")
    collection.add(*CODES, turn=40, drug_N=None)
    assert quarantine(collection.root) == {}


def test_code_of_another_drug(collection):
    collection.add("K-000010", turn=40, drug_N="K-000999")
    assert quarantine(collection.root) == {"code_mismatch": 1}


def test_code_missing(tmp_path):
    photo, labels = Collection(tmp_path / "set").add("K-000010", drug_N=None)
    photo.rename(photo.parents[1] / "photo.png")
    labels[0].rename(labels[0].parents[1] / "photo.json")
    assert quarantine(tmp_path / "set") == {"code_missing": 1}


# Photos and labels that do not match


def test_combination_with_a_missing_label(collection):
    photo, labels = collection.add(*CODES, turn=40)
    labels[2].unlink()
    scan = read_all(collection.root)
    assert scan.quarantined_by_reason() == {"box_count_mismatch": 1}
    assert "2 boxes for 3 K-codes in the name; without box: K-000030" == scan.quarantined[0].detail


def test_combination_with_a_box_too_many(collection):
    _, labels = collection.add(*CODES, turn=40)
    content = json.loads(labels[0].read_text(encoding="utf-8"))
    content["annotations"].append({"bbox": [60, 60, 10, 10]})
    labels[0].write_text(json.dumps(content))
    assert quarantine(collection.root) == {"box_count_mismatch": 1}


def test_two_labels_that_contradict_each_other(collection):
    _, labels = collection.add(*CODES, turn=40)
    content = json.loads(labels[1].read_text(encoding="utf-8"))
    content["images"][0]["drug_N"] = CODES[0]
    labels[1].write_text(json.dumps(content))
    assert quarantine(collection.root) == {"label_duplicate": 1}


def test_a_copied_label_is_skipped(collection):
    _, labels = collection.add("K-000010", turn=40)
    copy = labels[0].parents[1] / "copy" / labels[0].name
    copy.parent.mkdir()
    copy.write_bytes(labels[0].read_bytes())
    summary = read_all(collection.root).summary()
    assert summary["skipped"] == {"repeated_label": 1} and summary["quarantined"] == {}


def test_photo_or_label_alone(collection):
    _, labels = collection.add("K-000010", turn=40)
    labels[0].unlink()
    photo, _ = collection.add("K-000010", turn=60)
    photo.unlink()
    assert quarantine(collection.root) == {"image_missing": 1, "label_missing": 1}


def test_second_photo_of_the_same_name(collection):
    photo, _ = collection.add("K-000010", turn=40)
    second = photo.parents[1] / "K-000011" / photo.name
    second.parent.mkdir()
    second.write_bytes(photo.read_bytes())
    assert quarantine(collection.root) == {"image_duplicate": 1}


def test_the_report_adds_up(collection):
    collection.add("K-000010", turn=40, box=[])
    collection.add("K-000090")
    (collection.folder("train", "single", "images") / "Thumbs.db").write_bytes(b"")
    report = prepare_data(settings_for("data.images=40"), collection.root).report
    files = report["files"]
    assert files["found"] == files["used"] + files["skipped"] + files["quarantined"]
    assert report["photos"] == sum(report["photos_by_split"].values()) and report["pills"] == sum(
        report["pills_by_split"].values()
    )
    assert report["photos_by_split"]["not_drawn"] > 0 and report["left_out"] == {"class_too_small": 1}


# Classes, sampling and splitting


def test_class_with_one_image_is_left_out(collection):
    collection.add("K-000090")
    dataset = prepare_data(settings_for(), collection.root)
    assert "K-000090" not in dataset.class_map
    rows = dataset.manifest.filter(dataset.manifest["code"] == "K-000090")
    assert rows["split"].to_list() == ["left_out"] and rows["class_index"].to_list() == [-1]
    assert any(
        "fewer than 4 training photos (data.min_class_images): K-000090 (1)" in sentence
        for sentence in dataset.report["shortfalls"]
    )


def test_fewer_than_two_classes(tmp_path):
    lonely = Collection(tmp_path / "set")
    for turn in range(0, 100, 20):
        lonely.add("K-000010", turn=turn)
    with pytest.raises(DataError, match=r"Only 1 class is left to train on \(K-000010\), and a classifier needs two"):
        prepare_data(settings_for(), lonely.root)


def test_limits_are_kept_and_photos_stay_whole(collection):
    dataset = prepare_data(
        settings_for("data.images=30", "data.classes=2", "data.combination_fraction=0.2"), collection.root
    )
    used = dataset.manifest.filter(dataset.manifest["split"] != "left_out")
    assert used["image"].n_unique() == 30 and len(dataset.class_map) == 2
    for image, rows in used.group_by("image"):
        pills = Path(image[0]).name.split("_")[0].count("-")
        assert len(rows) == pills and rows["split"].n_unique() == 1
    counts = used.filter(used["photo_kind"] == "single")["code"].value_counts()["count"].to_list()
    assert max(counts) - min(counts) <= 1


def test_every_class_is_trained_and_tested(collection):
    manifest = prepare_data(settings_for(), collection.root).manifest
    for code in CODES:
        assert {"train", "validation", "test"} <= set(manifest.filter(manifest["code"] == code)["split"])


def test_unseen_drugs_have_no_class_index(collection):
    for turn in (0, 20, 40):
        collection.add("K-000900", part="val", turn=turn)
    collection.add("K-000010", "K-000900", part="val")
    dataset = prepare_data(settings_for(), collection.root)
    unseen = dataset.manifest.filter(dataset.manifest["split"] == "unseen")
    assert (
        dict(zip(unseen["code"], unseen["class_index"])) == {"K-000900": -1, "K-000010": 0}
        and "K-000900" not in dataset.class_map
    )


def test_official_validation_with_training_drugs(collection):
    collection.add("K-000900", part="val")
    collection.add("K-000010", part="val", turn=300)
    collection.add("K-000010", "K-000900", part="val")
    collection.add(*CODES, part="val", turn=300)
    dataset = prepare_data(settings_for(), collection.root)
    assert dataset.report["left_out"] == {"drug_also_in_training": 1, "group_also_in_training": 1}
    assert any(
        "in the training part too are not unseen: K-000010" in sentence for sentence in dataset.report["shortfalls"]
    )
    assert dataset.report["photos_by_split"]["unseen"] == 2


def test_same_seed_same_dataset(tmp_path, collection, monkeypatch):
    settings = settings_for("data.images=40", "data.classes=2")
    first = prepare_data(settings, collection.root)
    scandir, listdir, shuffled = os.scandir, os.listdir, []

    class Shuffled:
        def __init__(self, path="."):
            shuffled.append(path)
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: zlib.crc32(entry.name.encode()))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __iter__(self):
            return self

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

        def close(self):
            pass

    monkeypatch.setitem(PLACES, "cache", tmp_path / "another cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Shuffled)
        patch.setattr(
            os, "listdir", lambda path=".": random.Random(str(path)).sample(names := listdir(path), len(names))
        )
        again = prepare_data(settings_for("data.images=40", "data.classes=2"), collection.root)
    assert (
        shuffled
        and again.manifest.equals(first.manifest)
        and again.class_map == first.class_map
        and again.report == first.report
    )
    moved = prepare_data(settings, collection.root.rename(tmp_path / "moved"))
    assert moved.manifest.drop("image").equals(first.manifest.drop("image"))
    other = prepare_data(settings_for("data.images=40", "data.classes=2", "seed=7"), tmp_path / "moved")
    assert not other.manifest.drop("image").equals(first.manifest.drop("image"))


def test_no_group_is_divided(collection):
    manifest = prepare_data(settings_for(), collection.root).manifest
    assert manifest.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1


def test_group_leak_is_refused():
    with pytest.raises(DataError, match=r"capture group K-000010\|front\|0\|0\|low is in test and in train"):
        check_groups(pl.DataFrame({"group": ["K-000010|front|0|0|low"] * 2, "split": ["train", "test"]}))
    check_groups(pl.DataFrame({"group": ["a", "a"], "split": ["train", "left_out"]}))


def test_saved_files_of_two_runs_are_refused(tmp_path, collection):
    save_dataset(prepare_data(settings_for(), collection.root), tmp_path / "run")
    assert load_dataset(tmp_path / "run").report["photos"] == 62
    save_dataset(prepare_data(settings_for("data.classes=2"), collection.root), tmp_path / "other")
    (tmp_path / "run" / "class_map.json").write_bytes((tmp_path / "other" / "class_map.json").read_bytes())
    with pytest.raises(DataError, match="of two different runs"):
        load_dataset(tmp_path / "run")
    (tmp_path / "other" / "manifest.parquet").write_bytes(b"half")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path / "other")


# YOLO


def yolo_set(root: Path, data: str, photos: dict[str, str | None]) -> Path:
    """A YOLO dataset: label text by photo, such as {"train/a": "0 0.5 0.5 0.2 0.2"}."""
    for name, label in photos.items():
        for kind in ("images", "labels"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        image_of(name, (40, 30)).save(root / "images" / f"{name}.jpg")
        if label is not None:
            (root / "labels" / f"{name}.txt").write_text(label)
    (root / "data.yaml").write_text(data)
    return root


BOX = "0.5 0.5 0.2 0.2"
YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [aspirin, biotin, cetirizine]\n"


def test_yolo_keeps_its_split_and_leaves_out_untrained_classes(tmp_path):
    photos = {f"train/{number}{turn}": f"{number} {BOX}" for number in (0, 1) for turn in range(5)}
    photos |= {"val/x": f"0 {BOX}", "val/y": f"2 {BOX}", "val/z": f"0 {BOX}\n2 0.2 0.2 0.2 0.2"}
    dataset = prepare_data(settings_for(), yolo_set(tmp_path, YAML, photos))
    assert dataset.class_map.codes == ("aspirin", "biotin")
    assert dataset.report["photos_by_split"] == {
        "train": 10,
        "validation": 2,
        "test": 0,
        "unseen": 0,
        "left_out": 1,
        "not_drawn": 0,
    }
    assert dataset.report["left_out"] == {"class_without_training_photo": 1}
    assert any("figures come from its validation part" in sentence for sentence in dataset.report["shortfalls"])


def test_yolo_without_validation_is_held_out_by_source_photo(tmp_path):
    photos = {
        f"train/{number}{turn}_jpg.rf.{copy}": f"{number} {BOX}"
        for number in (0, 1)
        for turn in range(8)
        for copy in "abc"
    }
    dataset = prepare_data(
        settings_for(), yolo_set(tmp_path, "train: images/train\nnames: {0: aspirin, 1: biotin}\n", photos)
    )
    assert dataset.report["photos_by_split"]["validation"] and dataset.report["photos_by_split"]["test"]
    assert dataset.manifest.unique(["group", "split"]).height == 16


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (f"9 {BOX}", "class_unknown"),
        (f"-1 {BOX}", "class_unknown"),
        ("0 1.2 0.5 0.2 0.2", "box_outside"),
        ("0 0.95 0.5 0.4 0.2", "box_outside"),
        ("0 0.5 0.5 0.2", "label_unreadable"),
        ("0 a b c d", "label_unreadable"),
        ("0 0.5 0.5 0 0.2", "box_missing"),
        ("0 nan 0.5 0.2 0.2", "box_outside"),
    ],
)
def test_yolo_lines(tmp_path, label, reason):
    scan = read_all(yolo_set(tmp_path, YAML, {"train/good": f"0 {BOX}", "train/bad": label}))
    assert scan.quarantined_by_reason() == {reason: 1} and len(scan.records) == 1


def test_yolo_background_photos_are_skipped(tmp_path):
    scan = read_all(yolo_set(tmp_path, YAML, {"train/good": f"0 {BOX}", "train/empty": "", "train/none": None}))
    assert scan.summary()["skipped"] == {"photo_without_label": 1, "photo_without_pills": 2} and not scan.quarantined


def test_yolo_damaged_header_and_label_of_bytes(tmp_path):
    root = yolo_set(tmp_path, YAML, {"train/good": f"0 {BOX}", "train/header": f"0 {BOX}", "train/bytes": ""})
    (root / "images/train/header.jpg").write_bytes(b"")
    (root / "labels/train/bytes.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert read_all(root).quarantined_by_reason() == {"image_damaged": 1, "label_unreadable": 1}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("train: images/nowhere\nnames: [a, b]\n", "names no folder of training photos that exists"),
        ("train: images/train\n", "names no classes"),
        ("train: [images/train\nnames: x", "cannot be read as YAML"),
        ("train: images/train\nnames: {a: b}\n", "neither a list nor numbered entries"),
    ],
)
def test_yolo_data_file_faults(tmp_path, data, sentence):
    with pytest.raises(DataError, match=sentence):
        prepare_data(settings_for(), yolo_set(tmp_path, data, {"train/good": f"0 {BOX}"}))


def test_yolo_a_folder_in_another_one_keeps_its_split_and_is_counted_once(tmp_path):
    photos = {"a": f"0 {BOX}", "b": f"1 {BOX}", "val/c": f"0 {BOX}", "val/d": f"1 {BOX}"}
    found = read_all(yolo_set(tmp_path, "train: images\nval: images/val\nnames: [a, b]\n", photos))
    assert found.summary()["files"] == {"found": 8, "used": 8, "skipped": 0, "quarantined": 0}
    assert {Path(record.image).stem: record.official_split for record in found.records} == {
        "a": "train",
        "b": "train",
        "c": "val",
        "d": "val",
    }


def test_yolo_decomposed_names_match_their_labels(tmp_path):
    root = yolo_set(tmp_path, YAML, {"train/약": f"0 {BOX}"})
    label = root / "labels/train/약.txt"
    label.rename(label.with_name(unicodedata.normalize("NFD", label.name)))
    assert len(read_all(root).records) == 1


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    root, read = yolo_set(tmp_path / "set", YAML, {"train/a": f"0 {BOX}", "train/b": f"1 {BOX}"}), Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "a.txt":
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", refuse)
        report = scan(root, tmp_path / "out.parquet")
    assert report.quarantined == {"file_unreadable": 1} and report.pills == 1
    report = scan(root, tmp_path / "out.parquet")
    assert report.quarantined == {} and report.pills == 2 and report.buckets_read == 1
    assert scan(root, tmp_path / "out.parquet").buckets_read == 0


def test_cyclic_links_are_not_followed(tmp_path, collection):
    yolo = yolo_set(tmp_path / "yolo", YAML, {"train/a": f"0 {BOX}"})
    (yolo / "images/train/again").symlink_to(yolo)
    (yolo / "images/train/circle").symlink_to("circle")
    assert scan(yolo, tmp_path / "yolo.parquet").files == {"found": 2, "used": 2, "skipped": 0, "quarantined": 0}
    before = read_all(collection.root).summary()
    (collection.root / "train" / "images" / "single" / "self").symlink_to(".")
    assert scan(collection.root, tmp_path / "aihub.parquet").files == before["files"]


@pytest.mark.parametrize("inside", ["data.yaml", "dataset.yaml"])
def test_a_folder_of_datasets_is_no_dataset(tmp_path, inside):
    for name in ("first", "second"):
        yolo_set(tmp_path / name, YAML, {"train/a": f"0 {BOX}"})
        (tmp_path / name / "data.yaml").rename(tmp_path / name / inside)
    with pytest.raises(DataError, match="first in it is a dataset of its own: name that folder"):
        read_all(tmp_path)


def test_unrelated_yaml_is_ignored(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        image_of(name).save(tmp_path / "train" / name / "1.jpg")
    (tmp_path / "notes.yaml").write_bytes("이름: 약".encode("cp949"))
    assert len(read_all(tmp_path).records) == 2


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("notes.md", "ends in .parquet"),
        ("folder.parquet", "ends in .parquet"),
        ("set/out.parquet", "lies in the dataset"),
    ],
)
def test_manifest_never_replaces_other_files(tmp_path, out, sentence):
    root = yolo_set(tmp_path / "set", YAML, {"train/a": f"0 {BOX}"})
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=sentence):
        scan(root, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000"])
def test_unsupported_image_format_is_quarantined(tmp_path, kind):
    root = yolo_set(tmp_path, YAML, {"train/a": f"0 {BOX}", "train/b": f"0 {BOX}"})
    image_of("b").save(root / "images/train/b.jpg", kind)
    assert read_all(root).quarantined_by_reason() == {"image_damaged": 1}


def test_root_with_a_name_that_is_too_long():
    with pytest.raises(DataError, match="Cannot read the folder"):
        read_all("/tmp/" + "a" * 300)


def test_a_negative_number_of_workers_is_one_sentence(tmp_path, capsys):
    assert main(["scan", "--data-root", str(tmp_path), "--workers", "-3"]) == 2
    assert "--workers is -3: give the number of reading processes" in capsys.readouterr().err
