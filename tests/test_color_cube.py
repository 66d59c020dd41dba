"""`.cube` files as other programs write them, compared with colour-science, and damaged ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import colour
import numpy as np
import pytest
from PIL import Image, ImageFilter

from pillsnap.runtime.color.apply import apply_lut
from pillsnap.runtime.color.cube import CubeError, parse_cube, read_cube
from pillsnap.runtime.color.cube_write import cube_text, write_cube
from pillsnap.runtime.color.lut import Curves, Grid, Lut, identity_table


def look(colors: np.ndarray) -> np.ndarray:
    """A transformation that treats every channel differently, with values below 0 and above 1."""
    red, green, blue = np.moveaxis(colors, -1, 0)
    return np.stack([1.3 * red**0.8 - 0.1, 0.7 * green + 0.3 * red * blue, blue**2 + 0.05 * green - 0.02], axis=-1)


def grid_rows(points: int, form: str = "{:.7f}", low: float = 0.0, high: float = 1.0) -> list[str]:
    """Rows of a grid, red fastest."""
    axis = np.linspace(low, high, points)
    colors = [[red, green, blue] for blue in axis for green in axis for red in axis]
    return [" ".join(form.format(value) for value in row) for row in look(np.array(colors).clip(0))]


def curve_rows(points: int, form: str = "{:.7f}") -> list[str]:
    """Rows of three different curves."""
    table = np.linspace(0, 1, points)[:, None] ** [0.6, 1.0, 1.8]
    return [" ".join(form.format(value) for value in row) for row in table]


def three_d(points: int, *head: str, form: str = "{:.7f}", end: str = "\n", **range_of: float) -> str:
    return end.join([*head, f"LUT_3D_SIZE {points}", *grid_rows(points, form, **range_of), ""])


def one_d(points: int, *head: str, form: str = "{:.7f}") -> str:
    return "\n".join([*head, f"LUT_1D_SIZE {points}", *curve_rows(points, form), ""])


def both(points: int, side: int, *ranges: str) -> str:
    head = ['TITLE "both"', f"LUT_1D_SIZE {points}", *ranges[:1], f"LUT_3D_SIZE {side}", *ranges[1:]]
    return "\n".join([*head, *curve_rows(points), "", *grid_rows(side), ""])


IRIDAS, RESOLVE = colour.io.read_LUT_IridasCube, colour.io.read_LUT_ResolveCube
FILES: dict[str, tuple[str, Callable[[str], object]]] = {
    "17 points": (three_d(17), IRIDAS),
    "33 points": (three_d(33), IRIDAS),
    "64 points": (three_d(64), IRIDAS),
    "2 points": (three_d(2), IRIDAS),
    "a title": (three_d(5, 'TITLE "A film look, v2"'), IRIDAS),
    "comments": (three_d(5, "# made by hand", "#no space", "", "#"), IRIDAS),
    "comments between the rows": (three_d(5).replace("\n", "\n# here\n", 20), IRIDAS),
    "CRLF": (three_d(5, 'TITLE "crlf"', end="\r\n"), IRIDAS),
    "exponents": (three_d(5, form="{:.6e}"), IRIDAS),
    "tiny exponents": (three_d(2).replace("0.0000000", "1e-07"), IRIDAS),
    "whole numbers": (three_d(3, form="{:.0f}"), IRIDAS),
    "signs": (three_d(4, form="{:+.5f}"), IRIDAS),
    "tabs and spaces": (three_d(4).replace(" ", " \t  "), IRIDAS),
    "indented": ("  " + three_d(4).replace("\n", "\n   "), IRIDAS),
    "few decimals": (three_d(9, form="{:.2f}"), IRIDAS),
    "DOMAIN_MIN and DOMAIN_MAX": (
        three_d(6, "DOMAIN_MIN -0.1 -0.2 -0.3", "DOMAIN_MAX 1.5 2.0 3.0", low=-0.1, high=1.5),
        IRIDAS,
    ),
    "DOMAIN_MAX alone": (three_d(6, "DOMAIN_MAX 2 2 2", high=2.0), IRIDAS),
    "LUT_3D_INPUT_RANGE": (three_d(6, "LUT_3D_INPUT_RANGE 0.0 1.25", high=1.25), RESOLVE),
    "LUT_3D_INPUT_RANGE below 0": (three_d(6, "LUT_3D_INPUT_RANGE -0.5 1", low=-0.5), RESOLVE),
    "LUT_1D_INPUT_RANGE in a grid": (three_d(6, "LUT_1D_INPUT_RANGE 0.0 4.0"), RESOLVE),
    "curves": (one_d(16), IRIDAS),
    "curves of 1,024 points": (one_d(1024), IRIDAS),
    "curves with a domain": (one_d(9, "DOMAIN_MIN 0 0 0", "DOMAIN_MAX 1 2 4"), IRIDAS),
    "curves with exponents": (one_d(33, form="{:.5e}"), IRIDAS),
    "curves with a range": (one_d(17, "LUT_1D_INPUT_RANGE 0.0 1.5"), RESOLVE),
    "curves and a grid": (both(32, 9), RESOLVE),
    "curves and a grid, with ranges": (both(32, 9, "LUT_1D_INPUT_RANGE 0 2", "LUT_3D_INPUT_RANGE 0 1"), RESOLVE),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_colours_as_colour_science(name: str, tmp_path: Path):
    text, reference = FILES[name]
    path = tmp_path / "look.cube"
    path.write_bytes(text.encode())
    lut = read_cube(path)
    assert sum(table is not None for table in (lut.curves, lut.grid)) == text.count("D_SIZE")
    colors = np.random.default_rng(0).random((500, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference(str(path)).apply(colors)
    assert np.allclose(lut(colors), expected, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_written_and_read_again(name: str, tmp_path: Path):
    """What we write is read by colour-science as what we meant."""
    lut = parse_cube(FILES[name][0])
    path = tmp_path / "again.cube"
    write_cube(lut, path)
    colors = np.random.default_rng(1).random((300, 3))
    assert np.allclose(read_cube(path)(colors), lut(colors), atol=1e-6)
    reference = RESOLVE if lut.curves and lut.grid else IRIDAS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.allclose(reference(str(path)).apply(colors), lut(colors), atol=1e-6)


def test_what_a_file_says_is_kept():
    lut = parse_cube(three_d(3, 'TITLE "film"', "# one", "# two", "LUT_1D_INPUT_RANGE 0 4"))
    assert lut.title == "film" and lut.comments == ("one", "two")
    assert len(lut.notes) == 1 and "LUT_1D_INPUT_RANGE 0 4 in line 4" in lut.notes[0]


def test_a_byte_order_mark_and_titles_of_older_programs(tmp_path: Path):
    path = tmp_path / "old.cube"
    for encoding in ("utf-8-sig", "latin-1"):
        path.write_bytes(three_d(2, 'TITLE "Été"').encode(encoding))
        assert read_cube(path).title == "Été"


def test_red_is_fastest():
    """A LUT whose red output depends on nothing but red changes first in red."""
    rows = three_d(3).splitlines()[1:]
    lut = parse_cube(three_d(3))
    assert np.allclose(lut.grid.table[1, 0, 0], [float(word) for word in rows[1].split()])
    assert np.allclose(lut.grid.table[0, 0, 1], [float(word) for word in rows[9].split()])
    assert cube_text(lut).splitlines()[1:] == rows


GOOD = three_d(3).splitlines()
DAMAGED = {
    "a missing row": (GOOD[:-1], 27, "needs 27"),
    "only a head": (GOOD[:1], 1, "end after 0"),
    "a row too many": ([*GOOD, "0 0 0"], 29, "one colour more"),
    "NaN": ([*GOOD[:4], "0 nan 0", *GOOD[5:]], 5, "nan is no colour"),
    "NaN first": ([*GOOD[:4], "NaN 0 0", *GOOD[5:]], 5, "NaN is no colour"),
    "infinity": ([*GOOD[:4], "0 0 inf", *GOOD[5:]], 5, "inf is no colour"),
    "more than a table holds": ([*GOOD[:4], "0 0 -1e300", *GOOD[5:]], 5, "-1e300 is no colour"),
    "a domain that no number reaches": (["DOMAIN_MAX 1 1 1e308", *GOOD], 1, "3 numbers"),
    "text in a row": ([*GOOD[:4], "0 0.5x 0", *GOOD[5:]], 5, "'0.5x' is no number"),
    "an underscore": ([*GOOD[:4], "0 1_0 0", *GOOD[5:]], 5, "'1_0' is no number"),
    "a decimal comma": ([*GOOD[:4], "0,5 0 0", *GOOD[5:]], 5, "'0,5' is neither"),
    "two numbers": ([*GOOD[:4], "0 0", *GOOD[5:]], 5, "this line has 2"),
    "four numbers": ([*GOOD[:4], "0 0 0 1", *GOOD[5:]], 5, "this line has 4"),
    "two sizes": ([GOOD[0], "LUT_3D_SIZE 4", *GOOD[1:]], 2, "stands in line 1 already"),
    "two titles": (['TITLE "a"', 'TITLE "b"', *GOOD], 2, "stands in line 1 already"),
    "300 points": (["LUT_3D_SIZE 300", *GOOD[1:]], 1, "LUT_3D_SIZE is 300"),
    "1 point": (["LUT_3D_SIZE 1", "0 0 0"], 1, "LUT_3D_SIZE is 1"),
    "a size that is no number": (["LUT_3D_SIZE 3.0", *GOOD[1:]], 1, "a whole number"),
    "no size": (GOOD[1:], 1, "no LUT_1D_SIZE and no LUT_3D_SIZE"),
    "an empty file": ([], 1, "no LUT_1D_SIZE and no LUT_3D_SIZE"),
    "a domain without numbers": (["DOMAIN_MIN 0 0", *GOOD], 1, "3 numbers"),
    "a domain of nothing": (["DOMAIN_MIN 1 1 1", *GOOD], 1, "holds no colours"),
    "two ranges": (["DOMAIN_MAX 2 2 2", "LUT_3D_INPUT_RANGE 0 1", *GOOD], 2, "both give the input range"),
    "video range": (["LUT_IN_VIDEO_RANGE", *GOOD], 1, "'LUT_IN_VIDEO_RANGE' is neither"),
    "another format": (["<?xml version='1.0'?>", *GOOD], 1, "neither a number nor a keyword"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_with_their_line(name: str, tmp_path: Path):
    lines, line, words = DAMAGED[name]
    path = tmp_path / "damaged.cube"
    path.write_text("\n".join(lines))
    with pytest.raises(CubeError) as caught:
        read_cube(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ") and words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "nowhere.cube", tmp_path):
        with pytest.raises(CubeError, match="cannot be read"):
            read_cube(path)


@pytest.mark.parametrize("points", [2, 17, 33, 64, 126, 127])
def test_photos_get_the_colours_of_the_lut(points: int):
    """Within one level of the exact interpolation, and as near to it as Pillow's own."""
    table = np.clip(look(identity_table(points)), 0, 1)
    lut = Lut(Curves(np.linspace(0, 1, 20)[:, None] ** [0.9, 1.0, 1.1]), Grid(table))
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    photo[0], photo[1] = 0, 255
    exact = np.clip(lut(photo / 255), 0, 1) * 255
    difference = np.abs(apply_lut(lut, photo) - exact)
    assert difference.max() <= 1.5 and difference.mean() < 0.4
    if points <= 65:
        shaped = Image.fromarray(apply_lut(Lut(lut.curves), photo))
        pillow = shaped.filter(ImageFilter.Color3DLUT(points, table.transpose(2, 1, 0, 3).reshape(-1).tolist()))
        assert difference.mean() <= np.abs(np.asarray(pillow) - exact).mean() + 0.05


def test_photos_of_odd_sizes():
    lut = Lut(grid=Grid(identity_table(9)[..., ::-1]))
    for shape in ((1, 1, 3), (1, 7, 3), (65, 3, 3), (64, 2, 3)):
        photo = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        assert np.abs(apply_lut(lut, photo).astype(int) - photo[..., ::-1]).max() <= 1
        assert np.abs(apply_lut(lut, photo[:, ::-1]).astype(int) - photo[:, ::-1, ::-1]).max() <= 1
