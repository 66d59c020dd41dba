"""Annotated photos: names in Hangul where a font has it, codes where none has, labels inside the image."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from pillsnap.service.page import annotate

LETTERS = " .%?0123456789KTabletgm-가힣예시정"


@pytest.fixture(scope="module")
def korean_font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TrueType font in which each letter is a block of its own height, and a missing one a wide empty frame."""

    def block(width: int, height: int, hole: int = 0) -> object:
        pen = TTGlyphPen(None)
        for margin, corners in (
            (0, ((0, 0), (0, height), (width, height), (width, 0))),
            (hole, ((hole, hole), (width - hole, hole), (width - hole, height - hole), (hole, height - hole))),
        ):
            if margin or corners[0] == (0, 0):
                pen.moveTo(corners[0])
                for corner in corners[1:]:
                    pen.lineTo(corner)
                pen.closePath()
            if not hole:
                break
        return pen.glyph()

    names = [".notdef", *(f"u{ord(letter):04X}" for letter in LETTERS)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in LETTERS})
    font.setupGlyf(
        {
            name: block(800, 700, 100) if name == ".notdef" else block(300 + 9 * number, 300 + 9 * number)
            for number, name in enumerate(names)
        }
    )
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Blocks", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    font.setupPost()
    path = tmp_path_factory.mktemp("fonts") / "Blocks.ttf"
    font.save(path)
    return path


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the fonts of this machine, and clear the caches of earlier tests."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    for function in (annotate.find_font, annotate._font, annotate._glyph_pixels):
        function.cache_clear()


def pill(
    name: str = "예시정", box: tuple[float, ...] = (40, 60, 140, 160), identified: bool = True, code: str = "K-000030"
) -> SimpleNamespace:
    return SimpleNamespace(box=box, code=code, name=name, confidence=0.5, identified=identified)


def annotate_pills(*pills: SimpleNamespace, size: tuple[int, int] = (640, 480), **more: object) -> np.ndarray:
    photo = np.full((size[1], size[0], 3), 128, np.uint8)
    return np.asarray(Image.open(io.BytesIO(annotate.annotate_photo(photo, pills, **more))))


def test_a_font_of_the_system_is_found_and_a_name_in_hangul_is_drawn(
    korean_font: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fonts" / "deep").mkdir(parents=True)
    file = tmp_path / "fonts" / "deep" / "NanumGothic.ttf"
    file.write_bytes(korean_font.read_bytes())
    assert annotate.find_font(None) == str(file)
    assert annotate.label_of(pill(), str(file), 20, 1000) == "예시정 50%"
    assert annotate.label_of(pill(unicodedata.normalize("NFD", "예시정")), str(file), 20, 1000) == "예시정 50%", (
        "letters apart are put together"
    )
    assert annotate.label_of(pill("예시정\n\t가 "), str(file), 20, 1000) == "예시정 가 50%"


def test_without_such_a_font_the_code_is_drawn_and_one_warning_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pillsnap"):
        same = [annotate_pills(pill(name)) for name in ("예시정", "힣가")]
        latin, code = annotate_pills(pill("Tablet")), annotate_pills(pill("K-000030"))
    assert (same[0] == same[1]).all() and (same[0] == code).all() and (latin != code).any()
    lines = [record for record in caplog.records if "font of annotated pictures" in record.getMessage()]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING and "fonts-nanum" in lines[0].getMessage()


@pytest.mark.parametrize("wrong", ["missing.ttf", "text.ttf"])
def test_an_unusable_font_is_logged(wrong: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    assert annotate.find_font(tmp_path / wrong) is None
    assert wrong in caplog.text and "serve.font" in caplog.text
    assert annotate_pills(pill(), font=tmp_path / wrong).shape == (480, 640, 3)


def test_characters_missing_in_the_font_are_never_drawn(korean_font: Path) -> None:
    file = str(korean_font)
    assert (
        annotate.shows(file, "예시정 0")
        and not annotate.shows(file, "예시정漢")
        and not annotate.shows(file, "\U0001f48a")
    )
    assert annotate.label_of(pill("漢方"), file, 20, 1000) == "K-000030 50%"
    assert annotate.label_of(pill("漢方", code="漢"), file, 20, 1000) == "? 50%"
    assert annotate.label_of(pill(""), file, 20, 1000) == "K-000030 50%"


def test_a_long_name_is_shortened_and_its_confidence_stays(korean_font: Path) -> None:
    long = pill("예시정" * 200, identified=False)
    label = annotate.label_of(long, str(korean_font), 20, 400)
    assert (
        label.startswith("예시정")
        and label.endswith("...? 50%")
        and annotate._font(str(korean_font), 20).getlength(label) <= 400
    )


def test_identified_is_green_and_the_rest_is_orange(korean_font: Path) -> None:
    for identified, colour, other in (
        (True, annotate.IDENTIFIED, annotate.DOUBTFUL),
        (False, annotate.DOUBTFUL, annotate.IDENTIFIED),
    ):
        pixels = annotate_pills(pill(identified=identified), font=korean_font).astype(int)
        assert (np.abs(pixels - colour).max(axis=2) < 16).sum() > 500 and not (
            np.abs(pixels - other).max(axis=2) < 16
        ).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (64, 64), (640, 480), (1000, 1300), (5000, 4000)])
def test_photos_of_any_size_become_readable(size: tuple[int, int], korean_font: Path) -> None:
    annotated = annotate_pills(pill(box=(0, 0, *size)), size=size, font=korean_font)
    assert 640 <= max(annotated.shape) <= 1600 and min(annotated.shape[:2]) >= 48
    fraction = (np.abs(annotated.astype(int) - annotate.IDENTIFIED).max(axis=2) < 16).mean()
    assert fraction > 0.001, "the label is there"
    assert annotate_pills(size=size).shape == annotated.shape


def test_labels_stay_inside_and_apart() -> None:
    random = np.random.default_rng(7)
    for count in (1, 4, 10):
        corners = random.uniform((0, 0), (540, 380), (count, 2))
        boxes = np.hstack([corners, corners + random.uniform(40, 100, (count, 2))])
        labels = np.column_stack([random.uniform(60, 200, count), np.full(count, 18)])
        areas = annotate.place_labels(boxes, labels, (640, 480))
        assert (areas[:, :2] >= 0).all() and (areas[:, 2:] <= (640, 480)).all()
        assert all(
            annotate._covered(area[None], np.delete(areas, number, axis=0))[0] == 0 for number, area in enumerate(areas)
        )
    crowd = np.tile([100.0, 100, 120, 120], (300, 1))
    assert annotate.place_labels(crowd, np.full((300, 2), (80, 18)), (640, 480)).shape == (300, 4)


def test_boxes_outside_of_the_photo_do_no_harm(korean_font: Path) -> None:
    for box in ((-50, -50, 10, 10), (630, 470, 900, 900), (100, 100, 100, 100), (700, 500, 800, 600)):
        assert annotate_pills(pill(box=box), font=korean_font).shape == (480, 640, 3)


def test_annotation_imports_no_matplotlib() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pillsnap.service.page.annotate\n"
            "print(sorted({'matplotlib', 'torch', 'fontTools'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
