"""Caches, loaders and decoding processes: whatever happens to a cache, the pixels are the same."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import lmdb
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings
from pillsnap.data.batches import Batch, Batches, in_order
from pillsnap.data.cache.budget import Budget
from pillsnap.data.cache.crop_store import Crop, CropStore
from pillsnap.data.cache.lmdb import close_environment
from pillsnap.data.cache.open import build_cache, check_cache, clear_cache, describe_cache, open_store
from pillsnap.data.loaders import make_loader, received
from pillsnap.data.reading.records import DataError
from pillsnap.data.samples import Samples, classifier_samples, detector_samples
from pillsnap.data.workers import candidates, choose_workers
from pillsnap.runtime.boxes import Box

PHOTOS = 40
LARGE = 160
CACHES = ["hotset", "lmdb"]


def write_photo(path: Path, seed: int, height: int = 200, width: int = 160) -> None:
    """A photo with a coarse random pattern, so that every crop of it is different."""
    pattern = np.random.default_rng(seed).integers(0, 255, (height // 20, width // 20, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(pattern, (width, height), interpolation=cv2.INTER_LINEAR))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty small photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(PHOTOS):
        write_photo(folder / f"{number:03d}.png", number)
    return folder


def crops_of(photos: Path) -> list[Crop]:
    """Two crops and the whole of each photo."""
    return [
        Crop(str(path), box)
        for path in sorted(photos.glob("*.png"))
        for box in (Box(20, 20, 70, 60), None, Box(60, 90, 150, 190))
    ]


def read_all(store: CropStore) -> tuple[np.ndarray, np.ndarray]:
    """All crops, in batches of seven, and which of them have pixels."""
    pixels, good = np.zeros((len(store), store.size, store.size, 3), np.uint8), np.zeros(len(store), bool)
    for start in range(0, len(store), 7):
        numbers = np.arange(start, min(start + 7, len(store)))
        good[numbers] = store.read(numbers, pixels[start : start + 7])
    return pixels, good


def decoded(photos: Path, size: int = 64, margin: float = 0.12) -> np.ndarray:
    """The expected pixels."""
    pixels, good = read_all(CropStore(crops_of(photos), size, margin, 10**7))
    assert good.all()
    return pixels


def opened(
    photos: Path, cache: str, folder: Path, size: int = 64, margin: float = 0.12, budget: Budget | None = None
) -> CropStore:
    """A store with room for every crop."""
    return open_store(
        crops_of(photos), size, margin, 10**7, cache, folder, budget or Budget(10**9, lmdb=10**8, reserve=0)
    )


def file_of(folder: Path, cache: str) -> Path:
    """The file that holds the pixels."""
    return folder / "lmdb" / "data.mdb" if cache == "lmdb" else next((folder / "hotset").glob("*.pixels"))


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about the cache."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.getMessage().startswith("cache")
    ]


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_returns_the_same_pixels_as_decoding(
    cache: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = decoded(photos)
    for _ in range(2):
        pixels, good = read_all(opened(photos, cache, tmp_path))
        assert good.all() and np.array_equal(pixels, expected)
    monkeypatch.setattr("pillsnap.data.cache.crop_store.decode_photo", lambda *_: pytest.fail("decoded again"))
    store = opened(photos, cache, tmp_path)
    assert np.array_equal(read_all(store)[0], expected) and np.array_equal(store[5], expected[5])
    assert describe_cache(tmp_path)["filled"].drop_nulls().to_list() in ([1.0], []) and check_cache(
        tmp_path, progress=False
    )["wrong"].to_list() == [0]
    assert clear_cache(tmp_path) > 0 and not [path for path in tmp_path.rglob("*") if path.parent.name == cache]


FILL = """
import sys
from pathlib import Path
from pillsnap.data.cache import crop_store, open as cache
from pillsnap.data.cache.budget import Budget
from pillsnap.data.cache.crop_store import Crop
decoded, real = [], crop_store.decode_photo
def counting(reference, *rest):
    decoded.append(reference)
    return real(reference, *rest)
crop_store.decode_photo = counting
photos = sorted(str(path) for path in Path(sys.argv[1]).glob("*.png"))
budget = Budget(10**9, lmdb=10**8, reserve=0)
store = cache.open_store(
    [Crop(photo) for photo in photos], 96, 0.12, 10**8, sys.argv[2], Path(sys.argv[3]), budget
)
print("ready", flush=True)
sys.stdin.readline()
cache.build_cache([store], workers=2, progress=False)
print(len(decoded), flush=True)
"""


class Filling:
    """`build_cache` in a process of its own, which waits for `go` before it starts."""

    def __init__(self, photos: Path, cache: str, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FILL, str(photos), cache, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> Filling:
        """Start."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self

    def decoded(self) -> int:
        """Wait for the end; how many photos this process has decoded."""
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return int(output)

    def kill(self) -> None:
        """SIGKILL, as by the kernel when memory runs out."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that take some time to decode."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(6):
        write_photo(folder / f"{number:03d}.png", number, 1500, 1200)
    for number in range(6, LARGE):
        shutil.copy(folder / f"{number % 6:03d}.png", folder / f"{number:03d}.png")
    return folder


def content(folder: Path, cache: str) -> dict[str, bytes]:
    """Everything that a cache holds."""
    if cache == "hotset":
        return {path.name: path.read_bytes() for path in (folder / "hotset").iterdir()}
    with lmdb.open(str(folder / "lmdb"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {key.hex(): value for key, value in transaction.cursor()}


def how_many(folder: Path, cache: str) -> int:
    """Number of crops in a cache."""
    if cache == "lmdb":
        return len(content(folder, cache)) if (folder / "lmdb" / "data.mdb").exists() else 0
    return int(sum(np.count_nonzero(np.fromfile(path, np.uint64)) for path in (folder / "hotset").glob("*.sums")))


def written(folder: Path, cache: str) -> int:
    """A number that changes while a cache is filled."""
    return (folder / "lmdb" / "data.mdb").stat().st_size if cache == "lmdb" else how_many(folder, cache)


@pytest.fixture(scope="module")
def undisturbed(large_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Content of each cache when nothing interrupts it."""
    folder, contents = tmp_path_factory.mktemp("undisturbed"), {}
    for cache in CACHES:
        store = open_store(
            [Crop(str(path)) for path in sorted(large_photos.glob("*.png"))],
            96,
            0.12,
            10**8,
            cache,
            folder,
            Budget(10**9, lmdb=10**8, reserve=0),
        )
        assert build_cache([store], workers=2, progress=False)["made"].to_list() == [LARGE]
        close_environment(folder / "lmdb")
        contents[cache] = content(folder, cache)
    return contents


@pytest.mark.parametrize("cache", CACHES)
def test_killed_while_filling_it_goes_on_to_the_same_content(
    cache: str, large_photos: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
):
    rng, progress = random.Random(7), []
    for _ in range(3):
        filling = Filling(large_photos, cache, tmp_path / "killed").go()
        started, before = time.monotonic(), written(tmp_path / "killed", cache)
        while written(tmp_path / "killed", cache) == before and time.monotonic() < started + 20:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.04))
        filling.kill()
        progress.append(how_many(tmp_path / "killed", cache))
    assert progress == sorted(progress) and 0 < progress[-1] < LARGE, (
        "each go keeps what was there, and none came to the end"
    )
    left = Filling(large_photos, cache, tmp_path / "killed").go().decoded()
    assert left == LARGE - progress[-1]
    assert content(tmp_path / "killed", cache) == undisturbed[cache]


@pytest.mark.parametrize("cache", CACHES)
def test_two_processes_that_fill_one_cache_divide_the_work(
    cache: str, large_photos: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
):
    both = [Filling(large_photos, cache, tmp_path / "two") for _ in range(2)]
    counts = [filling.go() for filling in both]
    counts = [filling.decoded() for filling in counts]
    assert LARGE <= sum(counts) <= LARGE + 8 and min(counts) > LARGE // 8, counts
    assert content(tmp_path / "two", cache) == undisturbed[cache]


@pytest.mark.parametrize("cache", CACHES)
def test_flipped_bytes_are_detected_decoded_again_and_logged_once(cache: str, photos: Path, tmp_path: Path):
    expected = decoded(photos)
    read_all(opened(photos, cache, tmp_path))
    close_environment(tmp_path / "lmdb")
    path = file_of(tmp_path, cache)
    data = bytearray(path.read_bytes())
    offsets = (
        [64 * 64 * 3 * number + 5000 for number in (3, 50, 51)]
        if cache == "hotset"
        else [data.index(b"IDAT", len(data) * part // 4) + 500 for part in (1, 2, 3)]
    )
    for offset in offsets:
        data[offset] ^= 0x40
    path.write_bytes(data)
    assert check_cache(tmp_path, progress=False)["wrong"].to_list() == [3]
    store = opened(photos, cache, tmp_path)
    assert np.array_equal(read_all(store)[0], expected)
    assert [note.choice for note in store.take_notes()] == ["decoded again"]
    assert check_cache(tmp_path, progress=False)["wrong"].to_list() == [0], "and repaired"


@pytest.mark.parametrize("cache", CACHES)
def test_a_truncated_file_only_costs_time(cache: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = decoded(photos)
    read_all(opened(photos, cache, tmp_path))
    close_environment(tmp_path / "lmdb")
    path = file_of(tmp_path, cache)
    os.truncate(path, path.stat().st_size // 3)
    store = opened(photos, cache, tmp_path)
    assert np.array_equal(read_all(store)[0], expected)
    assert len(fallbacks(caplog)) + len(store.take_notes()) == 1
    assert check_cache(tmp_path, progress=False)["wrong"].to_list() == [0 if cache == "hotset" else 1]


FULL = """
import logging, resource, signal, sys
from pathlib import Path
import numpy as np
from pillsnap.data.cache.budget import Budget
from pillsnap.data.cache.open import open_store, record_notes
from pillsnap.data.cache.crop_store import Crop, CropStore
if sys.argv[4] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
messages = []
class Recording(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("pillsnap").addHandler(Recording())
crops = [Crop(str(path)) for path in sorted(Path(sys.argv[1]).glob("*.png"))]
pixels = np.zeros((2, len(crops), 160, 160, 3), np.uint8)
store = open_store(crops, 160, 0.12, 10**7, sys.argv[2], Path(sys.argv[3]), Budget(10**9, lmdb=10**8))
for _ in range(2):
    for start in range(0, len(crops), 8):
        assert store.read(np.arange(start, start + 8), pixels[0, start:start + 8]).all()
        record_notes(store.take_notes())
CropStore(crops, 160, 0.12, 10**7).read(np.arange(len(crops)), pixels[1])
assert np.array_equal(*pixels)
print(*messages, sep="\\n")
"""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A disk with room for a few crops, and its kind.

    A small file system where we may mount one, otherwise a limit on the size of files.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True
        ).returncode
        == 0
    )
    yield disk, "disk" if mounted else "limit"
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_a_full_disk_is_logged_once_and_changes_no_pixel(
    cache: str, limited: bool, photos: Path, full_disk: tuple[Path, str], tmp_path: Path
):
    folder, how = (tmp_path, "limit") if limited else full_disk
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(photos), cache, str(folder), how], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    messages = [line for line in result.stdout.splitlines() if line.strip()]
    assert len(messages) == 1 and "decoded every time" in messages[0], messages


def test_a_disk_that_fails_while_writing_is_logged_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, store, real, written = decoded(photos), opened(photos, "hotset", tmp_path), os.pwrite, []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr("pillsnap.data.cache.mmap_cache.os.pwrite", failing)
    for _ in range(2):
        assert np.array_equal(read_all(store)[0], expected)
    (note,) = store.take_notes()
    assert note.choice == "not filled any further" and "No space left" in note.reason and len(written) == 21


def test_boxes_are_in_pixels_of_the_whole_photo_where_it_is_decoded_smaller(photos: Path, tmp_path: Path):
    path = tmp_path / "large.jpg"
    image = Image.open(sorted(photos.glob("*.png"))[0]).convert("RGB").resize((800, 1000))
    image.save(path, quality=95)
    crops = [Crop(str(path), box) for box in (Box(80, 80, 280, 240), None, Box(240, 360, 600, 760))]
    whole, reduced = (read_all(CropStore(crops, 64, 0.12, most)) for most in (800_000, 799_999))
    assert whole[1].all() and reduced[1].all()
    assert np.abs(whole[0].astype(int) - reduced[0]).mean(axis=(1, 2, 3)).max() < 4


@pytest.mark.parametrize("cache", CACHES)
def test_another_photo_size_or_margin_is_cropped_anew(cache: str, photos: Path, tmp_path: Path):
    before = read_all(opened(photos, cache, tmp_path))[0]
    write_photo(photos / "007.png", 1007)
    os.utime(photos / "007.png", ns=(1, 1))
    expected = decoded(photos)
    after = read_all(opened(photos, cache, tmp_path))[0]
    changed = [number for number in range(len(before)) if not np.array_equal(before[number], after[number])]
    assert np.array_equal(after, expected) and changed == [21, 22, 23]
    for size, margin in ((72, 0.12), (64, 0.2)):
        assert np.array_equal(read_all(opened(photos, cache, tmp_path, size, margin))[0], decoded(photos, size, margin))


def test_a_hotset_that_holds_a_part_returns_the_same_pixels(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected, budget = decoded(photos), Budget(50 * 3 * 64 * 64 + 100, reserve=0)
    for _ in range(2):
        store = opened(photos, "hotset", tmp_path, budget=Budget(budget.memory, reserve=0))
        assert store.capacity() == 50 and np.array_equal(read_all(store)[0], expected)
    assert store.filled().tolist() == [True] * 50 + [False] * 70
    more = opened(photos, "hotset", tmp_path, budget=Budget(10**9, reserve=0))
    assert more.filled().sum() == 50 and build_cache([more], 2, progress=False)["made"].to_list() == [70]
    assert np.array_equal(read_all(more)[0], expected)


@pytest.fixture
def manifest(photos: Path) -> pl.DataFrame:
    """Two pills on each photo; three photos are damaged, one is missing."""
    rows = [
        {
            "image": str(path),
            "width": 160,
            "height": 200,
            "x1": x1,
            "y1": y1,
            "x2": x2,
            "y2": y2,
            "class_index": (number + x1) % 7,
        }
        for number, path in enumerate(sorted(photos.glob("*.png")))
        for x1, y1, x2, y2 in ((20, 20, 70, 60), (60, 90, 150, 190))
    ]
    for number in (5, 21, 22):
        path = photos / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:300])
    (photos / "033.png").unlink()
    return pl.DataFrame(rows)


DAMAGED = {5, 21, 22, 33}


def settings_for(cache: str, folder: Path, *more: str) -> Settings:
    """Settings with small crops and frames."""
    return load_settings(
        profile="cpu",
        overrides=[
            "model.classifier.image_size=48",
            "model.detector.image_size=64",
            f"data.cache={cache}",
            f"paths.cache_root={folder}",
            *more,
        ],
    )


def two_epochs(samples: Samples, settings: Settings, workers: int, start: int = 0) -> list[Batch]:
    """The batches of ten steps, from `start` samples on."""
    return list(
        received(
            make_loader(samples, Batches(len(samples), 8, 80, seed=5, start=start), settings, workers=workers), samples
        )
    )


def same(one: Batch, two: Batch) -> bool:
    """Whether two batches are the same in everything that is trained on."""
    return all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("images", "labels", "pills", "counts", "numbers")
    )


@pytest.mark.parametrize("opening", [classifier_samples, detector_samples])
def test_order_and_content_depend_on_neither_cache_nor_processes(opening, manifest: pl.DataFrame, tmp_path: Path):
    reference = None
    for cache, workers in (("none", 0), ("none", 2), ("hotset", 0), ("hotset", 1), ("lmdb", 2), ("hotset", 2)):
        settings = settings_for(cache, tmp_path / "cache")
        samples = opening(manifest, settings)
        batches = two_epochs(samples, settings, workers)
        reference = reference or (batches, samples.damaged.keys())
        assert all(same(one, two) for one, two in zip(batches, reference[0], strict=True)), (cache, workers)
        assert samples.damaged.keys() == reference[1] and not samples.notes, (cache, workers)
        assert cache == "none" or samples.store.filled().sum() == len(samples) - len(samples.damaged), (cache, workers)
    rest = two_epochs(opening(manifest, settings), settings, 1, start=56)
    assert all(same(one, two) for one, two in zip(rest, reference[0][7:], strict=True)), (
        "and a resumed run sees the same"
    )


def test_batches_stay_full_and_damaged_photos_count_once(
    manifest: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = settings_for("hotset", tmp_path / "cache")
    samples = detector_samples(manifest, settings)
    batches = two_epochs(samples, settings, 2)
    assert [len(batch.images) for batch in batches] == [8] * 10 and all(len(batch.boxes) == 8 for batch in batches)
    assert not any(DAMAGED & set(batch.numbers.tolist()) for batch in batches) and samples.damaged.keys() == DAMAGED
    assert sum(record.getMessage().startswith("skipped a damaged photo") for record in caplog.records) == len(DAMAGED)
    crops = classifier_samples(manifest, settings)
    seen = [
        number
        for batch in received(make_loader(crops, in_order(crops, 8), settings, workers=2), crops)
        for number in batch.numbers.tolist()
    ]
    assert seen == [number for number in range(2 * PHOTOS) if number // 2 not in DAMAGED], (
        "an evaluation leaves them out"
    )


def test_a_note_from_two_processes_is_logged_once(
    manifest: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = settings_for("hotset", tmp_path / "cache")
    before = two_epochs(detector_samples(manifest, settings), settings, 0)
    path = file_of(tmp_path / "cache", "hotset")
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    caplog.clear()
    after = two_epochs(detector_samples(manifest, settings), settings, 2)
    assert all(same(one, two) for one, two in zip(before, after, strict=True))
    assert len(fallbacks(caplog)) == 1 and "decoded again" in fallbacks(caplog)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_photo_is_one_error_message(workers: int, manifest: pl.DataFrame, tmp_path: Path):
    settings, gone = settings_for("none", tmp_path), manifest.with_columns(image=pl.col("image") + ".gone")
    samples = detector_samples(gone, settings)
    with pytest.raises(DataError, match="^Hardly any photo can be decoded"):
        two_epochs(samples, settings, workers)
    with pytest.raises(DataError, match="^None of the 40 photos"):
        list(received(make_loader(samples, in_order(samples, 8), settings, workers=workers), samples))


def test_the_number_of_processes_is_measured_once(
    manifest: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "pillsnap")
    settings, measured = settings_for("hotset", tmp_path, "dataloader.num_workers=auto"), []

    def measure(samples: Samples, batch_size: int, workers: int, settings: Settings, start: int) -> float:
        measured.append(workers)
        return 1.0 / (1 + workers)

    samples, most = detector_samples(manifest, settings), len(os.sched_getaffinity(0))
    assert choose_workers(samples, 8, settings, measure) == most and measured == candidates(most)
    assert choose_workers(samples, 8, settings, measure) == most and measured == candidates(most), "cached"
    assert choose_workers(samples, 16, settings, measure) == most and len(measured) == 2 * len(candidates(most)), (
        "another size is measured"
    )
    (tmp_path / "workers.json").write_text("{cut off")
    assert choose_workers(samples, 8, settings, measure) == most and len(measured) == 3 * len(candidates(most))
    assert list(json.loads((tmp_path / "workers.json").read_text()).values())[0]["workers"] == most
    assert sum("measured earlier" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(DataError, match="num_workers is auto"):
        make_loader(samples, in_order(samples, 8), settings)


def test_a_hotset_that_lost_a_file_is_named_and_skipped(tmp_path, photos, caplog):
    build_cache([opened(photos, "hotset", tmp_path, size=32)], progress=False)
    build_cache([opened(photos, "hotset", tmp_path, size=48)], progress=False)
    first, second = sorted((tmp_path / "hotset").glob("*.json"))
    first.write_text('{"si')
    second.with_suffix(".pixels").unlink()
    assert len(describe_cache(tmp_path)) == 0 and len(check_cache(tmp_path, progress=False)) == 0
    assert sum("pillsnap cache clear removes them" in record.message for record in caplog.records) == 4
    clear_cache(tmp_path)
    assert not list((tmp_path / "hotset").iterdir())
