"""Scans of the AI Hub collection.

Any layout, packed or not, gives the same table, and so does a scan that was interrupted and continued.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from pillsnap.data.reading.photo_files import decode_photo, is_member, photo_name, read_photo
from pillsnap.data.reading.records import DataError, ScanError
from pillsnap.data.scan.scan import check_usable, plan_scan, read_report, scan
from pillsnap.runtime.images import DamagedImage

ENGLISH = {
    "train": "train",
    "val": "val",
    "images": "images",
    "labels": "labels",
    "single": "single",
    "combination": "combination",
    "combo": "combo",
}
KOREAN = {
    "train": "01.데이터/1.Training",
    "val": "01.데이터/2.Validation",
    "images": "원천데이터",
    "labels": "라벨링데이터",
    "single": "단일경구약제 5000종",
    "combination": "경구약제조합 5000종",
    "combo": "조합",
}
SINGLES = (
    ("train", 1, "K-000001"),
    ("train", 1, "K-000033"),
    ("train", 2, "K-000065"),
    ("val", 1, "K-000900"),
)  # part, number of the archive, drug
COMBINATIONS = (("train", 1, ("K-000001", "K-000065")), ("val", 1, ("K-000033", "K-000900")))


def png(stem: str) -> bytes:
    """A small PNG, different for each stem."""
    buffer = io.BytesIO()
    colour = zlib.crc32(stem.encode())
    Image.new("RGB", (97, 128), (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(buffer, "PNG")
    return buffer.getvalue()


def label(code: str, left: int, **facts) -> bytes:
    """The label of one pill."""
    described = {
        "drug_N": code,
        "dl_name": f"예시정 {code}",
        "width": 97,
        "height": 128,
        "leng_long": 8.5,
        "leng_short": "8",
        "thick": 4,
    } | facts
    return json.dumps(
        {"images": [described], "annotations": [{"bbox": [left, 40, 15, 15]}]}, ensure_ascii=False
    ).encode()


def contents() -> Iterator[tuple[str, str, int, dict[str, bytes], dict[str, bytes]]]:
    """Part, kind, number of the archive, and the photos and labels in it."""
    for part, pack, code in SINGLES:
        stems = [
            f"{code}_0_{background}_{side}_0_60_{turn:03d}_200"
            for background in (0, 1)
            for side in (0, 1)
            for turn in (0, 20)
        ]
        yield (
            part,
            "single",
            pack,
            {f"{code}/{stem}.png": png(stem) for stem in stems},
            {f"{code}_json/{stem}.json": label(code, 30) for stem in stems},
        )
    for part, pack, codes in COMBINATIONS:
        name = "-".join(["K", *(code[2:] for code in codes)])
        stem = f"{name}_0_0_0_0_60_000_200"
        photos = {f"{name}/{stem}.png": png(stem), f"{name}/{name}_index.png": b"overview"}
        yield (
            part,
            "combination",
            pack,
            photos,
            {f"{name}_json/{code}/{stem}.json": label(code, 5 + 40 * number) for number, code in enumerate(codes)},
        )


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def pack(path: Path, files: dict[str, bytes], above: str = "") -> None:
    """Add files to an archive; `above` is a leading folder in cp949, without the UTF-8 flag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = above.encode("cp949")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr("Q" * len(raw) + name, data)
    if above:
        path.write_bytes(path.read_bytes().replace(b"Q" * len(raw), raw))


def official(
    root: Path,
    words: dict[str, str] = ENGLISH,
    above: str = "",
    packed=lambda pack: False,
    unpacked=lambda pack: True,
    inner: str = "",
) -> Path:
    """The collection in its official folders, each archive packed, unpacked or both."""
    for part, kind, number, photos, labels in contents():
        for what, letter, files in (("images", "S", photos), ("labels", "L", labels)):
            short = words.get("combo") if kind == "combination" else "단일" if words is KOREAN else "single"
            name = f"{part[0].upper()}{letter}_{number}_{short}"
            folder = root / above / words[part] / words[what] / words[kind]
            if packed(number):
                pack(folder / f"{name}.zip", files, f"{name}/" if inner else "")
            if unpacked(number):
                unpack(folder / name, files)
    return root


def decomposed(root: Path) -> Path:
    """Korean names in decomposed Unicode form, as a Mac writes them."""
    return official(root, {key: unicodedata.normalize("NFD", word) for key, word in KOREAN.items()})


def loose(root: Path) -> Path:
    """All archives in one folder."""
    official(root / "work", KOREAN, packed=lambda _: True, unpacked=lambda _: False)
    for path in sorted((root / "work").rglob("*.zip")):
        shutil.move(path, root / path.name)
    shutil.rmtree(root / "work")
    return root


def flat(root: Path) -> Path:
    """The flat edition."""
    for part, _, _, photos, labels in contents():
        if part == "train":
            unpack(root / "train_images", {name.rpartition("/")[2]: data for name, data in photos.items()})
            unpack(root / "train_annotations", labels)
    unpack(root / "test_images", {"1.png": png("1")})
    return root


always, never = (lambda _: True), (lambda _: False)
LAYOUTS = {
    "below data": lambda root: official(root, above="data"),
    "Korean": lambda root: official(root, KOREAN, above="166.약품식별 경구약제 이미지 데이터"),
    "Korean, decomposed": decomposed,
    "packed": lambda root: official(root, packed=always, unpacked=never),
    "packed, Korean": lambda root: official(root, KOREAN, packed=always, unpacked=never, inner="code page"),
    "loose archives": loose,
    "one archive packed": lambda root: official(
        root, packed=lambda number: number == 1, unpacked=lambda number: number == 2
    ),
    "one archive also packed": lambda root: official(root, packed=lambda number: number == 2),
}


def rows(manifest: Path) -> pl.DataFrame:
    """The manifest without the location of the photos."""
    table = pl.read_parquet(manifest)
    name = pl.col("image").map_elements(photo_name, return_dtype=pl.String)
    return table.with_columns(image=name).drop("content_hash").sort("image", "code")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of a dataset, on a path with Korean letters and spaces."""
    return tmp_path / "알약 사진 모음" / "dataset 576"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The rows of the unpacked collection."""
    folder = tmp_path_factory.mktemp("reference")
    report = scan(official(folder / "set"), folder / "manifest.parquet", workers=1)
    assert (
        report.files == {"found": 72, "used": 70, "skipped": 2, "quarantined": 0}
        and report.photos == 34
        and report.pills == 36
    )
    return rows(folder / "manifest.parquet")


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_rows(root, reference, layout):
    LAYOUTS[layout](root)
    report = scan(root, root.parent / "manifest.parquet", workers=1)
    assert (
        rows(root.parent / "manifest.parquet").equals(reference) and not report.quarantined and report.layout == "aihub"
    )
    assert report.files["found"] == sum(report.files[name] for name in ("used", "skipped", "quarantined"))
    images = pl.read_parquet(report.manifest)["image"].unique().to_list()
    for image in images:
        assert read_photo(image) == png(photo_name(image).removesuffix(".png"))
    packed = sum(map(is_member, images))
    assert packed == {"packed": 34, "packed, Korean": 34, "loose archives": 34, "one archive packed": 26}.get(layout, 0)


def test_photo_both_packed_and_unpacked_is_used_once(root):
    report = scan(official(root, packed=always), root.parent / "manifest.parquet", workers=1)
    assert report.skipped == {"also_unpacked": 70, "index_image": 4} and report.photos == 34
    assert not any(map(is_member, pl.read_parquet(report.manifest)["image"]))


def test_flat_edition(root, reference):
    report = scan(flat(root), root.parent / "manifest.parquet")
    assert rows(root.parent / "manifest.parquet").equals(reference.filter(pl.col("official_split") == "train"))
    assert report.skipped == {"index_image": 1, "test_image_without_label": 1}


def test_content_hash_is_the_checksum_in_the_archive(root):
    report = scan(official(root, packed=always, unpacked=never), root.parent / "manifest.parquet", workers=1)
    for image, content_hash, size in pl.read_parquet(report.manifest).select("image", "content_hash", "bytes").rows():
        assert content_hash == f"crc32:{zlib.crc32(read_photo(image)):08x}" and size == len(read_photo(image))


def test_plan_reads_nothing(root):
    official(root, packed=lambda number: number == 1, unpacked=lambda number: number == 2)
    for path in root.rglob("*.json"):
        path.write_bytes(b"not a label")
    plan = plan_scan(root)
    assert plan.parts.rows() == [("train", 3, 2, 4, 52), ("val", 2, 0, 4, 20)] and "aihub, 5 shards" in str(plan)


# Damage


def flip(path: Path, position: int, value: int = 255) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= value
    path.write_bytes(data)


def test_damaged_members(root):
    official(root, packed=always, unpacked=never)
    photos, labels = root / "train/images/single/TS_1_single.zip", root / "train/labels/single/TL_1_single.zip"
    with zipfile.ZipFile(photos) as archive:
        damaged_photo, locked = archive.infolist()[1:3]
    with zipfile.ZipFile(labels) as archive:
        damaged_label = archive.infolist()[4]
    flip(labels, damaged_label.header_offset + 30 + len(damaged_label.filename) + 40)
    flip(photos, damaged_photo.header_offset + 30 + len(damaged_photo.filename) + 60)
    flip(
        photos,
        photos.read_bytes().index(locked.filename.encode(), photos.read_bytes().index(b"PK\x01\x02")) - 46 + 8,
        1,
    )  # the flag of an encrypted member
    report = scan(root, root.parent / "manifest.parquet", workers=1)
    entries = pl.read_parquet(report.quarantine)
    assert report.quarantined == {"archive_damaged": 2, "image_missing": 1} and report.photos == 32
    assert any(
        "checksum differs" in detail or "is damaged in the archive" in detail for detail in entries["detail"]
    ) and any("is encrypted" in detail for detail in entries["detail"])
    image = next(image for image in pl.read_parquet(report.manifest)["image"] if image.endswith(damaged_photo.filename))
    with pytest.raises(DamagedImage, match=f"{damaged_photo.filename} is damaged in the archive"):
        decode_photo(image)


@pytest.mark.parametrize("damage", ["cut off", "table"])
def test_damaged_archive(root, reference, damage):
    official(root, packed=always, unpacked=never)
    broken = root / "val/labels/single/VL_1_single.zip"
    data = broken.read_bytes()
    broken.write_bytes(
        data[:-40]
        if damage == "cut off"
        else data[: data.index(b"PK\x01\x02")] + b"XX" + data[data.index(b"PK\x01\x02") + 2 :]
    )
    report = scan(root, root.parent / "manifest.parquet", workers=1)
    assert len(report.notes) == 1 and f"{broken} " in report.notes[0] and "copy or download it again" in report.notes[0]
    assert report.quarantined == {"archive_damaged": 1, "label_missing": 8}
    assert rows(root.parent / "manifest.parquet").equals(
        reference.filter(pl.col("group").str.starts_with("K-000900").not_())
    )


def test_an_archive_above_4_gb(root):
    """Offsets that need 64 bits: photos after a hole of 5 GB in a sparse file."""
    official(root, packed=always, unpacked=never)
    path = root / "train/images/single/TS_2_single.zip"
    data, hole = path.read_bytes(), 5 << 30
    table = data.index(b"PK\x01\x02")
    entries, end = [], data.rindex(b"PK\x05\x06")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = info.filename.encode(), struct.pack("<HHQ", 1, 8, info.header_offset + hole)
            entries.append(
                struct.pack(
                    "<4s6H3L5H2L",
                    b"PK\x01\x02",
                    45,
                    45,
                    0,
                    8,
                    0,
                    33,
                    info.CRC,
                    info.compress_size,
                    info.file_size,
                    len(name),
                    len(extra),
                    0,
                    0,
                    0,
                    0,
                    0xFFFFFFFF,
                )
                + name
                + extra
            )
    directory = b"".join(entries)
    offset, size, count = hole + table, len(directory), len(entries)
    tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset) + struct.pack(
        "<4sLQL", b"PK\x06\x07", 0, offset + size, 1
    )
    with open(path, "r+b") as file:
        file.truncate(0)
        file.seek(hole)
        file.write(
            data[:table]
            + directory
            + tail
            + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, 0xFFFFFFFF, 0)
        )
    report = scan(root, root.parent / "manifest.parquet", workers=1)
    images = [image for image in pl.read_parquet(report.manifest)["image"] if "TS_2_single" in image]
    assert len(images) == 8 and report.photos == 34 and not report.quarantined and end > table
    assert all(read_photo(image) == png(photo_name(image).removesuffix(".png")) for image in images)


def test_ten_thousand_in_quarantine(root):
    photos, labels = {}, {}
    for number in range(10_000):
        stem = f"K-{number // 100:06d}_0_{number // 50 % 2}_0_0_60_{number % 50:03d}_200"
        photos[f"{stem[:8]}/{stem}.png"] = b"a picture"
        if number % 4:
            labels[f"{stem[:8]}_json/{stem}.json"] = (b"<html>", label(stem[:8], 656), label("K-000999", 30))[
                number % 4 - 1
            ]
    pack(root / "TS_1_single.zip", photos)
    pack(root / "TL_1_single.zip", labels)
    report = scan(root, root.parent / "manifest.parquet")
    assert report.quarantined == dict.fromkeys(
        ("box_outside", "code_mismatch", "label_missing", "label_unreadable"), 2500
    )
    assert report.files == {"found": 17_500, "used": 0, "skipped": 0, "quarantined": 17_500}
    table = pl.read_parquet(report.quarantine)
    assert len(table) == 10_000 and table["files"].sum() == 17_500 and table["detail"].str.len_chars().min() > 10
    with pytest.raises(
        DataError, match="No photo below .* can be used: 17500 files found as aihub; in quarantine: box_outside 2500"
    ):
        check_usable(report)


def test_paths_that_are_not_utf8(root):
    official(root)
    folder = os.fsencode(root / "train/images/single/TS_1_single") + "/단일".encode("cp949") + b"/K-000001"
    os.makedirs(folder)
    Path(os.fsdecode(folder), "K-000001_0_2_0_0_60_000_200.png").write_bytes(png("odd"))
    report = scan(root, root.parent / "manifest.parquet", workers=1)
    assert report.quarantined == {"name_unreadable": 1} and report.photos == 34
    assert "with its code page (cp949)" in pl.read_parquet(report.quarantine)["detail"][0]


# Scanning again


def many(root: Path, drugs: int = 12, photos: int = 60) -> Path:
    """A collection with one shard per drug."""
    for number in range(drugs):
        code = f"K-{32 * number:06d}"
        stems = [f"{code}_0_{turn // 18 % 3}_0_{turn // 54}_60_{20 * (turn % 18):03d}_200" for turn in range(photos)]
        unpack(root / f"train/images/single/TS_1_single/{code}", {f"{stem}.png": b"a picture" for stem in stems})
        unpack(
            root / f"train/labels/single/TL_1_single/{code}_json", {f"{stem}.json": label(code, 30) for stem in stems}
        )
    return root


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards that no test changes."""
    return many(tmp_path_factory.mktemp("many") / "set")


@pytest.fixture(scope="module")
def undisturbed(collection: Path) -> bytes:
    """The manifest of an uninterrupted scan."""
    out = collection.parent / "undisturbed.parquet"
    report = scan(collection, out, workers=1)
    assert report.pills == 720 and report.buckets == 12
    return out.read_bytes()


def test_number_of_workers_does_not_matter(tmp_path, collection, undisturbed):
    report = scan(collection, tmp_path / "manifest.parquet", workers=2)
    assert (tmp_path / "manifest.parquet").read_bytes() == undisturbed and report.buckets_read == 12
    assert read_report(tmp_path / "manifest.parquet")["files"] == {
        "found": 1440,
        "used": 1440,
        "skipped": 0,
        "quarantined": 0,
    }


def test_only_what_changed_is_read_again(root):
    many(root, drugs=4, photos=3)
    pack(root / "TS_2_single.zip", {"K-000200/K-000200_0_0_0_0_60_000_200.png": b"a picture"})
    pack(root / "TL_2_single.zip", {"K-000200_json/K-000200_0_0_0_0_60_000_200.json": label("K-000200", 30)})
    out = root.parent / "manifest.parquet"
    labels = root / "train/labels/single/TL_1_single"
    assert (scan(root, out).buckets_read, scan(root, out).buckets_read) == (5, 0)

    changed = sorted((labels / "K-000032_json").iterdir())[0]
    changed.write_bytes(label("K-000032", 31))
    assert scan(root, out).buckets_read == 1 and 31.0 in pl.read_parquet(out)["x1"]

    changed.unlink()
    report = scan(root, out)
    assert report.buckets_read == 1 and report.quarantined == {"label_missing": 1}

    pack(root / "TL_2_single.zip", {"K-000201_json/K-000201_0_0_0_0_60_000_200.json": label("K-000201", 30)})
    report = scan(root, out)
    assert report.buckets_read == 1 and report.quarantined == {"image_missing": 1, "label_missing": 1}

    shutil.rmtree(labels / "K-000064_json")
    shutil.rmtree(root / "train/images/single/TS_1_single/K-000064")
    report = scan(root, out)
    assert (report.buckets, report.buckets_read) == (4, 0) and "K-000064" not in pl.read_parquet(out)["code"]


def test_damaged_shards_are_read_again(tmp_path, collection, undisturbed):
    out = tmp_path / "manifest.parquet"
    scan(collection, out, workers=1)
    cache = sorted((tmp_path / "manifest.parts").glob("*.parquet"))
    cache[0].write_bytes(cache[0].read_bytes()[:100])
    cache[1].write_bytes(cache[2].read_bytes())
    cache[3].unlink()
    cache[4].with_suffix(".json").write_text("{")
    out.write_bytes(b"half")
    assert scan(collection, out, workers=1).buckets_read == 4 and out.read_bytes() == undisturbed


SCRIPT = """
import sys
from pillsnap.data.reading.records import ScanError
from pillsnap.data.scan.scan import scan
if __name__ == "__main__":
    try:
        print(scan(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), progress=False).buckets_read)
    except ScanError as error:
        sys.exit(str(error))
"""


def started(tmp_path: Path, root: Path, out: Path, workers: int, script: str = SCRIPT, **options) -> subprocess.Popen:
    """A scan in a separate process."""
    (tmp_path / "scan_it.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "scan_it.py"), str(root), str(out), str(workers)],
        text=True,
        start_new_session=True,
        **options,
    )


def running(group: int) -> list[str]:
    """The running processes of a process group."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, status = path.read_text(errors="replace").partition(" (")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, member_of = status.rpartition(") ")[2].split()[:3]
        if int(member_of) == group and state not in "ZX":
            states.append(f"{number} {state}")
    return states


def all_gone(group: int) -> bool:
    """Whether a process group ends within five seconds."""
    for _ in range(50):
        if not running(group):
            return True
        time.sleep(0.1)
    return False


def test_killed_at_any_moment_and_continued(tmp_path, collection, undisturbed):
    out, parts = tmp_path / "manifest.parquet", tmp_path / "manifest.parts"
    moments = random.Random(576).sample(range(1, 23), 5)
    killed = 0
    for moment in sorted(moments):
        process = started(tmp_path, collection, out, workers=2, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if parts.is_dir() and len(os.listdir(parts)) >= moment:
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
        assert all_gone(process.pid), "worker processes must exit together with their parent"
    assert killed >= 3
    report = scan(collection, out, workers=1)
    assert report.buckets_read < 12 and out.read_bytes() == undisturbed
    assert read_report(out)["pills"] == 720


def test_leftovers_of_killed_scans_are_removed(tmp_path, collection):
    parts = tmp_path / "manifest.parts"
    parts.mkdir()
    for name, age in (
        (".train_K-000000.0123abcd.parquet", 7200),
        (".train_K-000000.0123abce.parquet", 0),
        (".keep", 7200),
    ):
        (parts / name).write_bytes(b"half")
        os.utime(parts / name, (time.time() - age,) * 2)
    beside = [
        tmp_path / name
        for name in (".manifest.0123abcd.parquet", ".manifest.quarantine.0123abcd.parquet", ".other.0123abcd.parquet")
    ]
    for path in beside:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 7200,) * 2)
    scan(collection, tmp_path / "manifest.parquet", workers=1)
    assert {path.name for path in parts.glob(".*")} == {".train_K-000000.0123abce.parquet", ".keep"}
    assert [path.exists() for path in beside] == [False, False, True]


def test_two_scans_at_once(tmp_path, collection, undisturbed):
    out = tmp_path / "manifest.parquet"
    processes = [started(tmp_path, collection, out, workers=1, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip().isdigit() for process in processes] == [True, True] and not any(
        process.returncode for process in processes
    )
    assert out.read_bytes() == undisturbed and read_report(out)["pills"] == 720
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "manifest.parts").glob(".*"))


def test_script_without_main_guard_gets_an_error(tmp_path, collection):
    script = (
        "import sys\nfrom pillsnap.data.scan.scan import scan\n"
        "scan(sys.argv[1], sys.argv[2], workers=2, progress=False)\n"
    )
    process = started(tmp_path, collection, tmp_path / "manifest.parquet", 2, script, stderr=subprocess.PIPE)
    assert "ScanError: A reading process ended by itself" in process.communicate(timeout=60)[1] and process.returncode


# A full disk


def may_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    probe = Path("/tmp") / f"pillsnap-mount-{os.getpid()}"
    probe.mkdir()
    done = (
        not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(probe)], capture_output=True
        ).returncode
        if shutil.which("mount")
        else False
    )
    if done:
        subprocess.run(["umount", str(probe)], check=True)
    probe.rmdir()
    return done


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def full_while_writing(root: Path, disk: Path, what: str) -> None:
    """Scan with little free space: an error of one sentence, and the earlier manifest is unchanged."""
    out = disk / "manifest.parquet"
    scan(root, out, workers=1)
    many(root, drugs=8, photos=40)
    if what == "manifest":
        scan(root, out, workers=1)
    before = out.read_bytes()
    status = os.statvfs(disk)
    free = 20_000 if what == "shards" else 4096
    (disk / "filler").write_bytes(b"x" * (status.f_bavail * status.f_frsize - free))
    with pytest.raises(
        ScanError,
        match="Cannot write below .*small disk.*No space left on device.*: free some space there "
        ".*the manifest of an earlier scan is unchanged",
    ) as caught:
        scan(root, out, workers=1)
    assert ("manifest.parts" in str(caught.value)) == (what == "shards") and "\n" not in str(caught.value)
    assert out.read_bytes() == before and not list(disk.glob(".*")) and not list((disk / "manifest.parts").glob(".*"))
    (disk / "filler").unlink()
    assert scan(root, out, workers=1).pills == 320


if may_mount():

    @pytest.mark.parametrize("what", ["shards", "manifest"])
    def test_full_disk(root, small_disk, what):
        full_while_writing(many(root, drugs=2, photos=5), small_disk, what)


def test_file_size_limit(tmp_path, root):
    """A substitute for a full disk without mount: no file may exceed eight kilobytes."""
    out = tmp_path / "manifest.parquet"
    scan(many(root, drugs=2, photos=5), out, workers=1)
    before = out.read_bytes()
    many(root, drugs=8, photos=40)
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n" + SCRIPT
    process = started(tmp_path, root, out, 1, limited, stderr=subprocess.PIPE)
    stderr = process.communicate()[1]
    assert (
        process.returncode == 1
        and stderr.count("\n") == 1
        and "Cannot write below" in stderr
        and "File too large" in stderr
    )
    assert out.read_bytes() == before and scan(root, out, workers=1).pills == 320
