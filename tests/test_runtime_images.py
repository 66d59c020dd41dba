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
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from pillsnap.answer.crops import crop_pill
from pillsnap.runtime import colour, decoders, images
from pillsnap.runtime.boxes import Box
from pillsnap.runtime.images import DamagedImage, ImageError, NotAnImage, TooManyPixels, decode_image, open_photo
from pillsnap.runtime.letterbox import GREY, Placement, halve, letterbox, normalise, to_letterbox, to_photo

pillow_heif.register_heif_opener()  # the tests write HEIC, too
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
        ("HEIF", {"quality": 95}, 3),
        ("AVIF", {"quality": 95}, 3),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("GIF", {}, 12),
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
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
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

    monkeypatch.setattr(decoders, "decode_image_png_u8", refuse)
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
    "data", [b"", b"x", b"two white tablets\n" * 400, b"%PDF-1.7\n", b"8BPS" + bytes(60), bytes(5000)]
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
        decode_image(saved(smooth_image(), "BMP"), max_pixels=WIDTH * HEIGHT - 1)
    assert decode_image(saved(smooth_image(), "JPEG"), max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)


def test_paths_are_named_in_the_message(tmp_path: Path) -> None:
    good, bad = tmp_path / "알약 사진.png", tmp_path / "notes.jpg"
    good.write_bytes(saved(smooth_image(), "PNG"))
    bad.write_text("not a photo")
    assert np.array_equal(decode_image(good), np.asarray(smooth_image()))
    for path in (bad, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=str(path.name)):
            decode_image(path)


def textured(width: int = 640, height: int = 480) -> Image.Image:
    noise = np.random.default_rng(4).normal(0, 8, (height, width, 3))
    across = np.linspace(30, 220, width)[None, :, None] * np.array([1.0, 0.8, 0.5])
    return Image.fromarray((across + noise).clip(0, 255).astype(np.uint8))


WHOLE = {
    "JPEG": ("JPEG", {"quality": 85}),
    "progressive": ("JPEG", {"quality": 85, "progressive": True}),
    "restarts": ("JPEG", {"quality": 85, "restart_marker_blocks": 8}),
    "PNG": ("PNG", {}),
    "WEBP": ("WEBP", {"quality": 80}),
    "lossless": ("WEBP", {"lossless": True}),
    "HEIC": ("HEIF", {"quality": 70}),
    "tiles": ("HEIF", {"quality": 70, "tile_size": 256}),
    "AVIF": ("AVIF", {"quality": 70}),
    "TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "GIF": ("GIF", {}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_half_a_photo_is_refused_however_it_ends(case: str) -> None:
    kind, options = WHOLE[case]
    whole = saved(textured(), kind, **options)
    assert decode_image(whole).shape == (480, 640, 3)
    for fraction in (0.3, 0.5, 0.75, 0.95):
        half = whole[: int(len(whole) * fraction)]
        ends = [half, half + bytes(len(whole) - len(half))]
        if kind == "JPEG":
            ends += [half + b"\xff\xd9", ends[1] + b"\xff\xd9", half + b"\xff\xd9" + bytes(500)]
        if kind == "PNG":
            ends.append(half + whole[-12:])
        if kind == "WEBP":
            ends.append(b"RIFF" + struct.pack("<I", len(half) - 8) + half[8:])
        for data in ends:
            with pytest.raises(DamagedImage, match="damaged"):
                decode_image(data)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_half_a_jpeg_of_another_mode_is_refused(mode: str) -> None:
    whole = saved(textured().convert(mode), "JPEG")
    with pytest.raises(DamagedImage):
        decode_image(whole[: len(whole) // 2] + b"\xff\xd9")


def test_half_a_photo_saved_again_is_refused() -> None:
    pixels = np.asarray(textured()).copy()
    pixels[200:] = 128
    for turned in (pixels, np.rot90(pixels)):
        for kind in ("JPEG", "PNG", "HEIF"):
            with pytest.raises(DamagedImage, match="cut off"):
                decode_image(saved(Image.fromarray(turned), kind))
    assert decode_image(saved(Image.new("RGB", (640, 480), (128, 128, 128)), "PNG")).shape == (480, 640, 3)


@pytest.mark.parametrize("mode, width", [("RGB", 640), ("RGB", 2200), ("L", 640), ("RGBA", 640), ("P", 640)])
def test_a_png_with_a_damaged_byte_is_refused(mode: str, width: int) -> None:
    """Whatever its decoder is: kornia_rs, OpenCV for large and grey ones, Pillow."""
    whole = saved(textured(width, 1000).convert(mode), "PNG", compress_level=1)
    assert decode_image(whole).shape == (1000, width, 3)
    for place in np.linspace(0.1, 0.95, 8):
        broken = bytearray(whole)
        broken[int(len(whole) * place)] ^= 0x55
        with pytest.raises(DamagedImage):
            decode_image(bytes(broken))
    with pytest.raises(DamagedImage):  # a download that was interrupted near its end
        decode_image(whole[: int(len(whole) * 0.97)] + bytes(len(whole) - int(len(whole) * 0.97)))


@pytest.mark.parametrize("case", WHOLE)
def test_blank_photos_are_whole(case: str) -> None:
    kind, options = WHOLE[case]
    half_blank = np.full((900, 1200, 3), 255, np.uint8)
    half_blank[:480, :640] = np.asarray(textured())
    for image in [Image.new("RGB", (1200, 900), name) for name in ("white", "grey", "black", "#5a7a3c")]:
        assert decode_image(saved(image, kind, **options)).shape == (900, 1200, 3)
    assert decode_image(saved(Image.fromarray(half_blank), kind, **options)).shape == (900, 1200, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_whole_jpegs_of_odd_writers_are_decoded(progressive: bool) -> None:
    plain = saved(textured(), "JPEG", progressive=progressive)
    expected = decode_image(plain)
    for odd in (
        plain[:-2],
        plain[:-2] + bytes(40) + plain[-2:],
        plain[:-2] + b"\xff" + plain[-2:],
        plain + plain[:900],
    ):
        assert np.array_equal(decode_image(odd), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_alone_is_applied(kind: str) -> None:
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    options: dict = {"pnginfo": text} if kind == "PNG" else {"xmp": xmp.encode(), "quality": 95}
    photo = open_photo(saved(smooth_image(), kind, **options))
    assert difference(photo.pixels, np.rot90(np.asarray(smooth_image()), -1)) < 4 and photo.size == (HEIGHT, WIDTH)
    exif = Image.Exif()
    exif[0x0112] = 3
    photo = open_photo(saved(smooth_image(), kind, exif=exif, **options))  # EXIF counts where both are there
    assert difference(photo.pixels, np.asarray(smooth_image())[::-1, ::-1]) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_heic_and_avif_are_turned_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = decode_image(saved(smooth_image(), "PNG", exif=exif))
    turned = open_photo(saved(smooth_image(), kind, quality=95, exif=exif.tobytes()))
    assert difference(turned.pixels, expected) <= 4 and turned.size == expected.shape[1::-1]


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    for kind, name in (("HEIF", "a.jpg"), ("AVIF", "b.png"), ("JPEG", "c.heic"), ("TIFF", "d.jfif"), ("GIF", "e")):
        (tmp_path / name).write_bytes(saved(smooth_image(), kind))
        assert decode_image(tmp_path / name).shape == (HEIGHT, WIDTH, 3)


def test_a_heic_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = saved(smooth_image(), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._load_heif.cache_clear()
    with pytest.raises(ImageError, match="The image cannot be read, a HEIC needs the package pillow-heif"):
        decode_image(heic)
    for kind in ("JPEG", "PNG", "AVIF"):
        assert decode_image(saved(smooth_image(), kind)).shape == (HEIGHT, WIDTH, 3)
    images._load_heif.cache_clear()


def test_a_raw_photo_is_no_photo_of_its_thumbnail() -> None:
    with pytest.raises(NotAnImage, match="raw"):
        decode_image(saved(smooth_image(), "TIFF", tiffinfo={254: 1}))


def profile_like(red: tuple, green: tuple, blue: tuple, gamma: float | None) -> bytes:
    """An RGB profile with other primaries (XYZ under D50) and a plain gamma curve, or that of sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, start, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            values = {b"r": red, b"g": green, b"b": blue}[name[:1]]
            struct.pack_into(">3i", profile, start + 8, *(round(value * 65536) for value in values))
        if gamma and name.endswith(b"TRC"):
            struct.pack_into(">4sIIH", profile, start, b"curv", 0, 1, round(gamma * 256))
    return bytes(profile)


PROFILES = {
    "Adobe RGB": profile_like(
        (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2
    ),
    "ProPhoto": profile_like((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491), 1.8),
    "Display P3": profile_like(
        (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), None
    ),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_colour_profile_is_converted_to_srgb(name: str) -> None:
    source = ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[name]))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = smooth_image()
    inside = ImageCms.profileToProfile(image, srgb, source)  # the same colours, in the profile's numbers
    for kind, options in (
        ("PNG", {}),
        ("TIFF", {}),
        ("JPEG", {"quality": 98, "subsampling": 0}),
        ("HEIF", {"quality": 95}),
    ):
        data = saved(inside, kind, icc_profile=PROFILES[name], **options)
        assert difference(decode_image(data), np.asarray(image)) < 3
        assert difference(decode_image(data), np.asarray(inside)) > 3


def test_colours_that_are_declared_without_a_profile() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image, inside = smooth_image(), {}
    for name in PROFILES:
        inside[name] = ImageCms.profileToProfile(image, srgb, ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[name])))
        inside[name].info.clear()  # the profile
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    avif = saved(inside["Display P3"], "AVIF", quality=95)
    place = avif.index(b"colrnclx") + 8
    files = {
        "Adobe RGB": saved(inside["Adobe RGB"], "JPEG", quality=98, subsampling=0, exif=exif),
        "Display P3": saved(inside["Display P3"], "HEIF", quality=95, color_primaries=12),
        "AVIF": avif[:place] + b"\0\x0c" + avif[place + 2 :],
    }
    for name, data in files.items():
        assert difference(decode_image(data), np.asarray(image)) < 3, name
    assert difference(decode_image(avif), np.asarray(inside["Display P3"])) < 2
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}  # sRGB
    plain = saved(inside["Adobe RGB"], "JPEG", quality=98, subsampling=0, exif=exif)
    assert difference(decode_image(plain), np.asarray(inside["Adobe RGB"])) < 1


def test_profiles_of_grey_and_cmyk_and_unusable_ones(caplog: pytest.LogCaptureFixture) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode_image(saved(smooth_image(), "JPEG"))
    assert np.array_equal(decode_image(saved(smooth_image(), "JPEG", icc_profile=srgb)), plain) and not caplog.records
    for broken in (b"no profile at all", PROFILES["ProPhoto"][:300], PROFILES["ProPhoto"][:131], bytes(4000)):
        colour._converter.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert np.array_equal(decode_image(saved(smooth_image(), "JPEG", icc_profile=broken)), plain)
        assert len(caplog.records) == 1 and "profile" in caplog.text
    for mode in ("L", "CMYK"):
        data = saved(smooth_image().convert(mode), "JPEG", icc_profile=srgb)
        assert np.array_equal(decode_image(data), decode_image(saved(smooth_image().convert(mode), "JPEG")))


@pytest.mark.parametrize("limit, factor", [(640 * 480, 1), (640 * 480 - 1, 2), (320 * 240 - 1, 4), (160 * 120 - 1, 8)])
def test_a_large_jpeg_is_reduced(limit: int, factor: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "CMYK"):
        photo = open_photo(saved(textured().convert(mode), "JPEG", exif=exif), limit)
        assert photo.pixels.shape == (640 // factor, 480 // factor, 3) and photo.size == (480, 640)
        assert photo.reduced(Box(80, 160, 240, 320)) == tuple(value / factor for value in (80, 160, 240, 320))
    if factor > 1:
        for other in (saved(textured(), "JPEG", progressive=True), saved(textured(), "HEIF"), saved(textured(), "PNG")):
            with pytest.raises(TooManyPixels, match="640 x 480 = 307,200 pixels"):
                decode_image(other, limit)
    with pytest.raises(DamagedImage):
        decode_image(saved(textured(), "JPEG")[:-3000] + b"\xff\xd9", limit)
    with pytest.raises(TooManyPixels):
        decode_image(saved(textured(), "JPEG"), 640 * 480 // 100)


def tall_jpeg(width: int, rows: int, **options) -> bytes:
    """A JPEG of any height that takes no memory to write: 16 rows of pixels, repeated after restart marks."""
    strip = saved(textured(width, 16), "JPEG", quality=60, restart_marker_rows=1, **options)
    frame, scan = strip.index(b"\xff\xc0"), strip.index(b"\xff\xda")
    scan += 2 + int.from_bytes(strip[scan + 2 : scan + 4], "big")
    head = strip[: frame + 5] + struct.pack(">H", 16 * rows) + strip[frame + 7 : scan]
    marks = [b"\xff" + bytes([0xD0 + number % 8]) for number in range(rows - 1)]
    return head + b"".join(strip[scan:-2] + mark for mark in [*marks, b"\xff\xd9"])


@pytest.mark.parametrize("width, rows, factor", [(9248, 434, 1), (12_000, 563, 2)])  # 64 and 108 megapixels
def test_photos_of_large_phones_are_decoded(width: int, rows: int, factor: int) -> None:
    photo, height = open_photo(tall_jpeg(width, rows)), 16 // factor
    assert photo.size == (width, 16 * rows) and photo.pixels.shape == (height * rows, width // factor, 3)
    strip = Image.open(io.BytesIO(saved(textured(width, 16), "JPEG", quality=60, restart_marker_rows=1)))
    expected = np.asarray(strip.resize((width // factor, height), Image.Resampling.BOX))
    assert difference(photo.pixels[:height], expected) < 6 and difference(photo.pixels[-height:], expected) < 6


def test_sixty_four_megapixels_are_decoded_in_formats_that_are_never_reduced() -> None:
    assert open_photo(one_bit_png(9248, 6944)).pixels.shape == (6944, 9248, 3)


@pytest.mark.parametrize("orientation, most", [(1, 165_000), (6, 315_000)])  # the pixels take 149.8 MB, turned twice
def test_two_hundred_megapixels_take_the_memory_of_fifty(tmp_path: Path, orientation: int, most: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "photo.jpg").write_bytes(tall_jpeg(16_320, 765, exif=exif, icc_profile=PROFILES["Display P3"]))
    check = (
        "import sys\nfrom pathlib import Path\nfrom pillsnap.runtime.images import open_photo\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "data = Path(sys.argv[1]).read_bytes()\nbefore = peak()\nphoto = open_photo(data)\n"
        "print(*photo.size, *photo.pixels.shape, peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, tmp_path / "photo.jpg"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *shape, kilobytes = map(int, done.stdout.split())
    assert shape == ([16_320, 12_240, 6120, 8160, 3] if orientation == 1 else [12_240, 16_320, 8160, 6120, 3])
    assert kilobytes < most


def test_the_limit_is_told_in_our_words() -> None:
    for side in (14_000, 60_000):  # more than Pillow warns of, and refuses
        with pytest.raises(TooManyPixels) as refused:
            decode_image(one_bit_png(side, side))
        assert "bomb" not in str(refused.value) and f"{side} x {side}" in str(refused.value)
    assert images.open_header(io.BytesIO(one_bit_png(60_000, 60_000))).size == (60_000, 60_000)


def test_random_damage_never_raises_anything_else() -> None:
    random = np.random.default_rng(2)
    kinds = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGBA"), ("BMP", "RGB")]
    kinds += [("HEIF", "RGB"), ("AVIF", "RGB"), ("TIFF", "RGB"), ("GIF", "P")]
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
        crop = crop_pill(photo, box, size=32)
        assert crop.shape == (32, 32, 3)
        small = crop_pill(photo, box, size=9)
        assert np.array_equal(small, crop_pill(photo, box, size=9, halves=[halve(photo)])), box


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
