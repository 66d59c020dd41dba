"""Photos as users and phones send them: unusual modes, turned, truncated, far too large, or no photos at all."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pillsnap.answer.crops import crop_pill
from pillsnap.runtime import images
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.images import DamagedImage, ImageError, NotAnImage, TooManyPixels, decode_image
from pillsnap.runtime.letterbox import GREY, Placement, letterbox, normalise, to_letterbox, to_photo

WIDTH, HEIGHT = 96, 64


def smooth_image() -> Image.Image:
    """A smooth image without any symmetry, so that a wrong orientation shows."""
    across, down = np.linspace(20, 230, WIDTH), np.linspace(0, 120, HEIGHT)
    red = np.broadcast_to(across, (HEIGHT, WIDTH))
    green = np.broadcast_to(down[:, None], (HEIGHT, WIDTH))
    blue = (red + green) / 2
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def one_bit_png(width: int, height: int) -> bytes:
    """A valid PNG of any size in a few kilobytes."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.mark.parametrize(
    "kind, options, largest",
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 3),
        ("JPEG", {"quality": 95}, 2),
        ("JPEG", {"quality": 95, "progressive": True}, 2),
    ],
)
def test_ordinary_images(kind: str, options: dict, largest: float) -> None:
    decoded = decode_image(saved(smooth_image(), kind, **options))
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    assert difference(decoded, np.asarray(smooth_image())) <= largest


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("P", "BMP"),
    ],
)
def test_unusual_modes_become_rgb(mode: str, kind: str) -> None:
    source = smooth_image().convert(mode)
    decoded = decode_image(saved(source, kind))
    assert decoded.shape == (HEIGHT, WIDTH, 3) and decoded.dtype == np.uint8
    assert difference(decoded, np.asarray(source.convert("RGB"))) < 4


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH, 4)])
def test_sixteen_bits_keep_the_upper_eight(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16)
    if len(shape) == 3 and shape[2] == 4:
        values[..., 3] = 2**16 - 1
    done, data = cv2.imencode(".png", values)
    assert done
    expected = (values >> 8).astype(np.uint8)
    expected = np.repeat(expected[..., None], 3, axis=2) if len(shape) == 2 else expected[..., 2::-1]
    assert np.abs(decode_image(data.tobytes()).astype(int) - expected).max() <= 1


def test_transparent_becomes_white() -> None:
    source = smooth_image().convert("RGBA")
    source.paste((200, 0, 0, 0), (0, 0, 10, 10))
    source.paste((0, 0, 0, 128), (20, 0, 30, 10))
    decoded = decode_image(saved(source, "PNG"))
    assert decoded[5, 5].tolist() == [255, 255, 255]
    assert np.abs(decoded[5, 25].astype(int) - 127).max() <= 1
    palette = smooth_image().convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decode_image(saved(palette, "PNG"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(smooth_image(), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert difference(decode_image(data), expected) <= 1


@pytest.mark.parametrize(
    "options", [{}, {"compress_level": 9}, {"gamma": True}, {"icc_profile": b"not a real profile"}, {"dpi": (300, 300)}]
)
def test_a_png_has_the_same_pixels_for_every_decoder(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    info = PngImagePlugin.PngInfo()
    if options.pop("gamma", False):
        info.add(b"gAMA", struct.pack(">I", 22000))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info, **options)
    assert np.array_equal(decode_image(file.getvalue()), pixels)

    def refuse(*arguments: object) -> None:
        raise RuntimeError("not this one")

    monkeypatch.setattr(images, "decode_image_png_u8", refuse)
    assert np.array_equal(decode_image(file.getvalue()), pixels)


def test_exif_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(smooth_image(), "PNG")
    late = plain[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00")) + plain[-12:]
    assert decode_image(late).shape == (WIDTH, HEIGHT, 3)


def test_damaged_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(saved(smooth_image(), "JPEG", exif=exif))
    start = data.index(b"Exif\x00\x00") + 6
    data[start : start + 8] = b"\xff" * 8
    assert decode_image(bytes(data)).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("BMP", "RGB")]
)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_truncated_images_are_refused(kind: str, mode: str, fraction: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    data = saved(Image.fromarray(noise).convert(mode), kind)
    with pytest.raises(DamagedImage, match="damaged"):
        decode_image(data[: int(len(data) * fraction)])


def test_bytes_behind_the_image_are_ignored() -> None:
    for kind in ("JPEG", "PNG"):
        plain = saved(smooth_image(), kind)
        assert np.array_equal(decode_image(plain + bytes(300) + b"trailer of a phone"), decode_image(plain))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"two white tablets\n" * 400, b"%PDF-1.7\n", b"GIF89a" + bytes(60), bytes(5000)]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        decode_image(data)


def test_hundred_megapixels_are_refused_before_decoding() -> None:
    data = one_bit_png(10_000, 10_001)
    assert len(data) < 100_000
    tracemalloc.start()
    with pytest.raises(TooManyPixels, match="100,010,000 pixels"):
        decode_image(data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    with pytest.raises(TooManyPixels):
        decode_image(one_bit_png(60_000, 60_000))
    with pytest.raises(TooManyPixels):
        decode_image(saved(smooth_image(), "JPEG"), max_pixels=WIDTH * HEIGHT - 1)
    assert decode_image(saved(smooth_image(), "JPEG"), max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)


def test_paths_are_named_in_the_message(tmp_path: Path) -> None:
    good, bad = tmp_path / "알약 사진.png", tmp_path / "notes.jpg"
    good.write_bytes(saved(smooth_image(), "PNG"))
    bad.write_text("not a photo")
    assert np.array_equal(decode_image(good), np.asarray(smooth_image()))
    for path in (bad, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=str(path.name)):
            decode_image(path)


def test_random_damage_never_raises_anything_else() -> None:
    random = np.random.default_rng(2)
    kinds = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGBA"), ("BMP", "RGB")]
    for kind, mode in kinds:
        intact = saved(smooth_image().convert(mode), kind)
        for _ in range(80):
            broken = bytearray(intact)
            for offset in random.integers(0, len(broken), 3):
                broken[offset] = random.integers(0, 256)
            try:
                decoded = decode_image(bytes(broken), max_pixels=1_000_000)
            except ImageError:
                continue
            assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3


def test_module_imports_all_that_it_needs() -> None:
    """Every error path works in a fresh process, where no notebook has imported anything."""
    check = (
        "import sys; from pillsnap.runtime.images import decode_image, ImageError\n"
        "png, jpeg = b'\\x89PNG\\r\\n\\x1a\\n' + bytes(40), b'\\xff\\xd8\\xff\\xe0' + bytes(40)\n"
        "for data in (b'', b'text', png, jpeg, b'BM' + bytes(60)):\n"
        "    try:\n        decode_image(data)\n"
        "    except ImageError as error:\n        print(type(error).__name__)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5


def test_crop_is_square_padded_and_never_outside() -> None:
    photo = np.full((100, 200, 3), 200, np.uint8)
    crop = crop_pill(photo, Box(80, 40, 120, 60), margin=0.1)
    assert crop.shape == (48, 48, 3) and (crop == 200).all()
    corner = crop_pill(photo, Box(0, 0, 40, 40), margin=0.25)
    assert (
        corner.shape == (60, 60, 3)
        and (corner[:10] == GREY).all()
        and (corner[:, :10] == GREY).all()
        and (corner[10:, 10:] == 200).all()
    )
    assert crop_pill(photo, Box(-500, -500, 9000, 9000)).shape[0] == 248
    for bad in (
        Box(200, 0, 220, 20),
        Box(0, 100, 9, 120),
        Box(5, 5, 5, 9),
        Box(9, 9, 5, 5),
        Box(0, 0, float("inf"), 9),
    ):
        with pytest.raises(ValueError, match="box"):
            crop_pill(photo, bad)


def test_crop_does_not_share_memory_with_the_photo() -> None:
    photo = np.zeros((50, 50, 3), np.uint8)
    crop_pill(photo, Box(10, 10, 30, 30))[:] = 255
    crop_pill(photo, Box(10, 10, 30, 30), margin=0.0, size=20)[:] = 255
    assert not photo.any()


def test_random_boxes_always_give_the_wanted_size() -> None:
    random = np.random.default_rng(3)
    photo = random.integers(0, 255, (61, 83, 3)).astype(np.uint8)
    for _ in range(300):
        x1, y1 = random.uniform(-30, 82), random.uniform(-30, 60)
        box = Box(x1, y1, max(x1, 0) + random.uniform(0.01, 90), max(y1, 0) + random.uniform(0.01, 90))
        assert crop_pill(photo, box, size=32).shape == (32, 32, 3)


@pytest.mark.parametrize("width, height", [(976, 1280), (640, 480), (320, 320), (5, 3000), (1, 1)])
def test_letterbox_and_back(width: int, height: int) -> None:
    square, placement = letterbox(np.full((height, width, 3), 50, np.uint8), 320)
    assert square.shape == (320, 320, 3) and isinstance(placement, Placement)
    boxes = np.array([[0, 0, width, height], [width * 0.2, height * 0.3, width * 0.6, height * 0.7]], np.float32)
    back = to_photo(to_letterbox(boxes, placement), placement, width, height)
    assert np.allclose(back, boxes, atol=1e-2 * max(1, max(width, height) / 320))


def test_normalise_is_the_formula() -> None:
    images = np.random.default_rng(4).integers(0, 256, (3, 17, 23, 3)).astype(np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    planes = normalise(images, mean, std)
    assert planes.shape == (3, 3, 17, 23) and planes.dtype == np.float32 and planes.flags.c_contiguous
    assert np.allclose(planes, ((images / 255 - mean) / std).transpose(0, 3, 1, 2), atol=1e-5)
