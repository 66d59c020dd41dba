"""The embedded sample: layout, labels, reproducible photos, and a write that survives an interruption."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from pillsnap.data.readers.aihub_layout import looks_like_aihub
from pillsnap.data.readers.aihub_names import parse_photo_name
from pillsnap.data.readers.layouts import read_all
from pillsnap.runtime.outlines import mask_of
from pillsnap.sample import write as sample
from pillsnap.sample.drugs import sample_drugs
from pillsnap.sample.plan import PlannedPhoto, arrange, gap, plan_sample, random_of, turned
from pillsnap.sample.relief import relief
from pillsnap.sample.render import Placed, Rendered, View, render
from pillsnap.sample.write import SampleError, draw_photo, draw_scene, write_sample


def few_of_each(seed: int = 42) -> list[PlannedPhoto]:
    """A small plan with every kind of photo."""
    plan = plan_sample(seed)
    kinds = [(split, single) for split in ("train", "val") for single in (True, False)]
    return [photo for kind in kinds for photo in [p for p in plan if (p.split, p.single) == kind][:6]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of a few photos of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "plan_sample", few_of_each)
        return write_sample(tmp_path_factory.mktemp("sample") / "set", workers=1)


def files_of(root: Path) -> dict[str, bytes]:
    """Every file of a sample by its path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_drugs_look_different_except_in_the_look_alike_groups() -> None:
    drugs = sample_drugs()
    assert (sum(not drug.unseen for drug in drugs), sum(drug.unseen for drug in drugs)) == (50, 5)
    groups = Counter((drug.shape, drug.length, drug.colors) for drug in drugs)
    assert sorted(count for count in groups.values() if count > 1) == [2, 2, 3]
    for side in (0, 1):
        assert len({(drug.shape, drug.length, drug.colors, drug.imprints[side]) for drug in drugs}) == 55
    assert {len(drug.edi_codes) for drug in drugs} == {0, 1, 2}
    assert {type(drug.item_seq) for drug in drugs} == {int, str}


def test_plan_has_two_photos_of_each_session_and_all_drugs_in_combinations() -> None:
    plan = plan_sample()
    singles = [photo for photo in plan if photo.split == "train" and photo.single]
    assert set(Counter(photo.drugs[0].code for photo in singles).values()) == {34}
    sessions = Counter(
        (photo.codes, photo.side, photo.view.background, photo.view.light, photo.view.elevation) for photo in singles
    )
    assert set(sessions.values()) == {2}
    used = Counter(drug.code for photo in plan if photo.split == "train" and not photo.single for drug in photo.drugs)
    assert len(used) == 50 and max(used.values()) - min(used.values()) <= 6
    arrangements = Counter(photo.codes for photo in plan if photo.split == "train" and not photo.single)
    assert len(arrangements) == 100 and set(arrangements.values()) == {3}


def test_layout_and_names_match_the_original(small: Path) -> None:
    expected = {
        "train/images/single/TS_1_single/K-000012",
        "train/labels/single/TL_1_single/K-000012_json",
        "val/images/single/VS_1_single/K-000901",
        "val/labels/single/VL_1_single/K-000901_json",
    }
    folders = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_dir()}
    assert expected <= folders
    assert sum(path.name.endswith("index.png") for path in small.rglob("*.png")) == 1
    for path in small.rglob("*.png"):
        if not path.name.endswith("index.png"):
            _, session = parse_photo_name(path.stem)
            assert (
                session.elevation in (60, 70, 75, 90)
                and session.azimuth % 20 == 0
                and session.side in ("front", "back")
            )


def test_labels_match_their_photo(small: Path) -> None:
    images = {path.stem: path for path in small.rglob("*.png")}
    for path in small.rglob("*_json/**/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, annotation = content["images"][0], content["annotations"][0]
        image = cv2.imread(str(images[path.stem]))
        assert (facts["width"], facts["height"]) == (488, 640) == image.shape[1::-1]
        assert facts["file_name"] == images[path.stem].name and facts["drug_N"][2:] in path.stem
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 488 and y + height <= 640 and 60 <= max(width, height) <= 260


def test_the_aihub_reader_reads_every_photo(small: Path) -> None:
    assert looks_like_aihub(small)
    result = read_all(small)
    assert not result.quarantined
    pills = sum(len(photo.drugs) for photo in few_of_each())
    assert len(result.records) == pills
    assert {record.official_split for record in result.records} == {"train", "val"}


def test_box_is_tight() -> None:
    photo = next(
        photo for photo in plan_sample() if photo.drugs[0].colors == ("yellow",) and photo.view.background == 0
    )
    image, ((x, y, width, height),) = draw_photo(photo)
    red, green, blue = (image[..., channel].astype(int) for channel in range(3))
    rows, columns = np.nonzero((red - blue > 60) & (green > 60))
    assert abs(columns.min() - x) <= 4 and abs(rows.min() - y) <= 4
    assert abs(columns.max() + 1 - x - width) <= 4 and abs(rows.max() + 1 - y - height) <= 8, (
        "the foot of a pill may be in the dark"
    )


def test_masks_hold_the_visible_pixels() -> None:
    drug = sample_drugs()[0]
    far, near = Placed(drug, 0, 0.0, 0.0, 0.0), Placed(drug, 0, 0.0, -7.0, 0.0)
    view = View(0, 1, 60, 0)
    both = render([far, near], view, np.random.default_rng(5))
    alone = [render([pill], view, np.random.default_rng(5)) for pill in (far, near)]
    assert np.array_equal(both.masks[1], alone[1].masks[0]), "the nearer pill is whole"
    assert np.array_equal(both.masks[0], alone[0].masks[0] & ~both.masks[1]), "it covers the farther one"
    assert 0 < both.masks[0].sum() < alone[0].masks[0].sum()
    empty = render([], view, np.random.default_rng(5))
    assert not empty.masks and not empty.owner.any()


def test_masks_and_boxes_agree_and_are_read_back(small: Path) -> None:
    scenes = {photo.stem: (photo, draw_scene(photo)) for photo in few_of_each()}
    for record in read_all(small).records:
        photo, scene = scenes[Path(record.image).stem]
        number = [drug.code for drug in photo.drugs].index(record.code)
        mask = mask_of(record.outline, record.width, record.height)
        assert np.array_equal(mask, scene.masks[number])
        x, y, width, height = scene.boxes[number]
        assert mask[y : y + height, x : x + width].sum() == mask.sum() > 0.4 * width * height


def test_pills_touch_but_do_not_overlap() -> None:
    closest = []
    for number, photo in enumerate(plan_sample()[1700:2000:3]):
        pills = arrange(photo.drugs, photo.side, random_of(number, "test"))
        shapes = [turned(pill.drug, pill.angle) + (pill.x, pill.y) for pill in pills]
        closest.append(min(gap(shapes[a], shapes[b]) for a in range(len(shapes)) for b in range(a)))
    assert min(closest) > -0.05, "millimetres"
    assert 25 <= sum(distance < 0.05 for distance in closest) <= 65


def test_same_bytes_for_any_order_and_number_of_workers(tmp_path: Path) -> None:
    one = write_sample(tmp_path / "one", workers=1, _limit=20)
    two = write_sample(tmp_path / "two", workers=2, _limit=20)
    assert files_of(one) == files_of(two)
    photos = plan_sample()[:2]
    assert not np.array_equal(draw_photo(photos[0], 42)[0], draw_photo(photos[0], 43)[0])
    assert np.array_equal(draw_photo(photos[1])[0], cv2.imread(str(photos[1].image(one)))[..., ::-1])


def test_a_finished_sample_is_reused_and_a_lost_photo_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_sample(tmp_path / "set", workers=1, _limit=6)
    before = files_of(root)
    monkeypatch.setattr(sample, "_write_photos", lambda *_: pytest.fail("a finished sample is written again"))
    write_sample(root, workers=1, _limit=6)
    write_sample(root, workers=1, _limit=3)
    monkeypatch.undo()
    plan_sample()[2].image(root).unlink()
    write_sample(root, workers=1, _limit=6)
    assert files_of(root) == before


def test_interrupted_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    whole = files_of(write_sample(tmp_path / "whole", workers=1, _limit=5))
    real, done = sample.draw_scene, []

    def stops(photo: PlannedPhoto, seed: int) -> Rendered:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(photo)
        return real(photo, seed)

    monkeypatch.setattr(sample, "draw_scene", stops)
    with pytest.raises(KeyboardInterrupt):
        write_sample(root, workers=1, _limit=5)
    assert not (root / "sample.json").exists() and len(list(root.rglob("*.png"))) == 3
    monkeypatch.undo()
    write_sample(root, workers=1, _limit=5)
    assert files_of(root) == whole


def test_a_relief_is_bitwise_reproducible_at_any_memory_address() -> None:
    threads, held = cv2.getNumThreads(), []
    cv2.setNumThreads(1)  # as in the processes that write the sample
    try:
        for drug in {drug.shape: drug for drug in sample_drugs()}.values():
            seen = set()
            for attempt in range(8):
                held.append(np.empty(1000 + 777 * attempt, np.uint8))
                relief.cache_clear()
                maps = relief(drug, 0)
                seen.add(b"".join(part.tobytes() for part in (maps.half, maps.slope, maps.paint, maps.shade)))
            assert len(seen) == 1, f"{drug.shape}: {len(seen)} different reliefs of 8"
    finally:
        cv2.setNumThreads(threads)


def test_a_sample_of_another_version_or_seed_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_sample(tmp_path / "set", workers=1, _limit=2)
    first = files_of(root)
    write_sample(root, seed=43, workers=1, _limit=2)
    assert files_of(root) != first
    assert len(list(root.rglob("*.png"))) == 2
    monkeypatch.setattr(sample, "GENERATOR", sample.GENERATOR + 1)
    write_sample(root, workers=1, _limit=2)
    assert json.loads((root / "sample.json").read_text())["generator"] == sample.GENERATOR


def test_foreign_photos_are_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "train" / "precious.png"
    precious.parent.mkdir()
    precious.write_bytes(b"not ours")
    with pytest.raises(SampleError, match="sample_root"):
        write_sample(tmp_path, workers=1, _limit=1)
    assert precious.read_bytes() == b"not ours"
