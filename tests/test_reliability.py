"""What clients can do to the real service, and that it still serves the next one.

Hostile files, slow and vanishing clients, full queues, reloads, killed processes.
"""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pillow_heif
import pytest
from PIL import Image
from serving import ADMIN, Running, running, wait_until_ready
from tiny_models import KEY, huge_png, photo_jpeg, save_classifier, save_detector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "models" / "first"
    folder.mkdir(parents=True)
    save_classifier(folder)
    save_detector(folder)
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        models,
        tmp_path_factory.mktemp("server"),
        f"  upload_idle_seconds: 1\n  upload_seconds: 4\n  model_root: {models.parent}\n",
    ) as opened:
        yield opened


def send(server: Running, data: bytes, query: str = "", **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/predict{query}", headers=KEY, files={"image": data}, timeout=30, **more)


def alive(server: Running) -> None:
    answer = send(server, photo_jpeg(), "?pipeline=combo")
    assert answer.status_code == 200 and [pill["code"] for pill in answer.json()["pills"]] == ["K-000030", "K-000007"]


def image_file(kind: str, **options: object) -> bytes:
    random_pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(random_pixels)
    (image.convert(options.pop("mode")) if "mode" in options else image).save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def png_with_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"0" * 100))
        + chunk(b"IEND", b"")
    )


def hostile_files() -> list[tuple[str, bytes]]:
    """Five hundred bad files, the same in every run."""
    dice, jpeg = random.Random(7), photo_jpeg()
    pillow_heif.register_heif_opener()
    whole = {kind: image_file(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "HEIF", "AVIF", "TIFF", "GIF")}
    found = [
        (f"{kind} cut at {fraction:.0%}", data[: int(len(data) * fraction)])
        for kind, data in whole.items()
        for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    found += [
        ("nothing", b""),
        ("one byte", b"\xff"),
        ("text", b"two white tablets"),
        ("html", b"<html><script>alert(1)</script></html>"),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("pdf", b"%PDF-1.7\n1 0 obj\n"),
        ("zip", b"PK\x03\x04" + bytes(100)),
        ("elf", b"\x7fELF" + bytes(100)),
        ("gzip", zlib.compress(bytes(10_000))),
        ("zeros", bytes(10_000)),
        ("PPM", image_file("PPM")),
        ("JPEG 2000", image_file("JPEG2000")),
        ("ICO", image_file("ICO")),
        ("HEIC of nothing", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)),
        ("100 million pixels", huge_png()),
        ("pickle", b"\x80\x04\x95" + bytes(50)),
        ("path", b"../../../../etc/passwd"),
        ("numbers", bytes(range(256)) * 10),
    ]
    found += [
        (f"claims {width} x {height}", png_with_size(width, height))
        for width in (0, 1, 65_535, 2**31 - 1)
        for height in (0, 2**31 - 1, 100_000)
    ]
    found += [
        ("polyglot zip", jpeg[:2000] + b"PK\x03\x04" + bytes(200)),
        ("polyglot html", b"<html>" + jpeg),
        ("polyglot script", b"GIF89a/*" + bytes(60) + b"*/=1;"),
    ]
    while len(found) < 500:
        kind = dice.choice(list(whole))
        data = bytearray(whole[kind])
        for _ in range(dice.randint(1, 40)):  # the head is hit too, or many would still be photos
            data[dice.randrange(min(len(data), dice.choice((16, 64, len(data)))))] = dice.randrange(256)
        found.append((f"{kind} with other bytes, {len(found)}", bytes(data[: dice.randint(len(data) // 2, len(data))])))
    return found


def test_five_hundred_hostile_uploads(server: Running) -> None:
    files = hostile_files()
    for _, data in files[:100]:
        send(server, data)
    before, statuses, wrong = server.memory_mb(), Counter(), []
    with httpx.Client(timeout=30) as client:
        for number, (name, data) in enumerate(files):
            answer = client.post(
                f"{server.url}/predict",
                headers=KEY,
                params={"pipeline": ("single", "combo")[number % 2]},
                files={"image": (f"../../{name}.jpg", data, "image/jpeg")},
            )
            statuses[answer.status_code] += 1
            good = answer.status_code == 200 and name.rpartition(",")[0].endswith(
                "with other bytes"
            )  # a few changed pixels still make a photo
            refused = 400 <= answer.status_code < 500 and set(answer.json()) == {"detail", "code", "request_id"}
            if not (good or refused):
                wrong.append((name, answer.status_code, answer.text[:200]))
    print(dict(statuses))
    assert not wrong and sum(statuses.values()) == 500 and statuses[415] + statuses[422] > 300
    alive(server)
    assert server.memory_mb() - before < 60, f"{before:.0f} -> {server.memory_mb():.0f} MB"
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, data",
    [
        ("CMYK", image_file("JPEG", mode="CMYK")),
        ("grey", image_file("PNG", mode="L")),
        ("palette", image_file("PNG", mode="P")),
        ("alpha", image_file("PNG", mode="RGBA")),
        ("16 bit", image_file("PNG", mode="I;16")),
        ("one bit", image_file("PNG", mode="1")),
        ("progressive", image_file("JPEG", progressive=True)),
        ("animated WebP", animated("WEBP")),
        ("animated PNG", animated("PNG")),
        ("TIFF", image_file("TIFF")),
        ("GIF", image_file("GIF", mode="P")),
        ("animated GIF", animated("GIF")),
        ("AVIF", image_file("AVIF")),
    ],
)
def test_unusual_images_are_predicted_or_refused_in_words(server: Running, name: str, data: bytes) -> None:
    answer = send(server, data)
    assert answer.status_code in (200, 415, 422), name
    assert answer.status_code == 200 or len(answer.json()["detail"].split()) > 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "HEIF", "BMP"])
def test_half_a_photo_is_refused(server: Running, kind: str) -> None:
    pillow_heif.register_heif_opener()
    whole = image_file(kind)
    half = whole[: len(whole) // 2]
    pixels = np.asarray(Image.open(io.BytesIO(photo_jpeg()))).copy()
    pixels[250:] = 128
    again = io.BytesIO()
    Image.fromarray(pixels).save(again, kind)
    for data in (half, half + bytes(len(half)), half + b"\xff\xd9", again.getvalue()):
        answer = send(server, data)
        assert answer.status_code == 422 and answer.json()["code"] == "damaged_image"
    alive(server)


@pytest.mark.parametrize(
    "body, kind",
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x", "multipart/form-data; boundary=x"),
        (b"--y\r\n\r\n--y--", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nz\r\n--x--", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n',
            "multipart/form-data; boundary=x",
        ),
        (b"z" * 5000, "multipart/form-data"),
        (b"z", "multipart/form-data; boundary=" + "x" * 5000),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n' + b"X: y\r\n" * 5000 + b"\r\n1\r\n--x--",
            "multipart/form-data; boundary=x",
        ),
        (b"{}", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (
            b'--x\r\nContent-Disposition: form-data; name="' + b"i" * 100_000 + b'"\r\n\r\n1\r\n--x--',
            "multipart/form-data; boundary=x",
        ),
        (b"\xff" * 1000, "multipart/form-data; boundary=\xff\xfe"),
    ],
)
def test_broken_forms_are_refused(server: Running, body: bytes, kind: str) -> None:
    for route in ("predict", "batch"):
        answer = httpx.post(
            f"{server.url}/{route}", headers=KEY | {"Content-Type": kind.encode("latin-1")}, content=body, timeout=30
        )
        assert 400 <= answer.status_code < 500 and answer.json()["code"], answer.text
    alive(server)


def open_upload(server: Running, announced: int = 1_000_000) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=30)
    head = (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY['X-API-Key']}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {announced}\r\n\r\n"
    )
    line.sendall(
        head.encode() + b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + b"\xff\xd8"
    )
    return line


def closing_answer(line: socket.socket) -> bytes:
    """What a server sends until it closes the connection."""
    answer = b""
    try:
        while part := line.recv(10_000):
            answer += part
    except ConnectionResetError:  # it closed while bytes were on their way to it
        pass
    line.close()
    return answer


def check_too_slow(answer: bytes) -> None:
    """A status that browsers do not repeat by themselves, and the end of the connection."""
    assert answer.startswith(b"HTTP/1.1 400 ") and b"upload_too_slow" in answer, answer[:300]
    assert b"connection: close" in answer.lower()


def test_slow_clients_time_out_and_block_no_other(server: Running) -> None:
    begun = time.monotonic()
    slow = [open_upload(server) for _ in range(20)]
    alive(server)
    for line in slow:
        check_too_slow(closing_answer(line))
    assert time.monotonic() - begun < 4 + 2, "cut on their silence"
    alive(server)


def test_a_slow_client_that_drips_is_cut_in_the_end_though_never_silent(server: Running) -> None:
    line, begun = open_upload(server), time.monotonic()
    for _ in range(40):
        try:
            line.sendall(b"\xff")
        except OSError:
            break
        line.settimeout(0.3)
        try:
            line.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            continue
    line.settimeout(30)
    check_too_slow(closing_answer(line))
    assert 3 < time.monotonic() - begun < 10
    alive(server)


def test_a_slow_upload_whose_bytes_keep_flowing_is_predicted(models: Path, tmp_path: Path) -> None:
    """It takes three times as long as a silence may, and longer than a request may compute."""
    with running(models, tmp_path, "  upload_idle_seconds: 1\n  upload_seconds: 20\n  request_seconds: 2\n") as server:
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        body = head + photo_jpeg() + b"\r\n--x--\r\n"
        line, rest = open_upload(server, len(body)), body[len(head) + 2 :]
        for start in range(0, len(rest), len(rest) // 8 + 1):
            time.sleep(0.4)
            line.sendall(rest[start : start + len(rest) // 8 + 1])
        answer = line.recv(65_536)
        line.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


def test_clients_that_vanish_leave_no_slot_taken(server: Running) -> None:
    for _ in range(50):
        open_upload(server).close()
    for _ in range(100):
        if "pillsnap_inside 0.0" in httpx.get(f"{server.url}/metrics", headers=KEY).text:
            break
        time.sleep(0.1)
    assert "pillsnap_inside 0.0" in httpx.get(f"{server.url}/metrics", headers=KEY).text
    alive(server)
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_a_full_queue_returns_503_and_retry_after(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, "  queue: 3\n  upload_idle_seconds: 20\n") as server:
        held = [open_upload(server) for _ in range(3)]
        for _ in range(100):
            refused = send(server, photo_jpeg())
            if refused.status_code == 503:
                break
        assert (
            refused.status_code == 503
            and refused.json()["code"] == "queue_full"
            and int(refused.headers["retry-after"]) >= 1
            and "slots of serve.queue" in refused.json()["detail"]
        )
        assert httpx.get(f"{server.url}/health").status_code == 200, "health checks need no slot of the queue"
        for line in held:
            line.close()
        for _ in range(100):
            if send(server, photo_jpeg()).status_code == 200:
                break
            time.sleep(0.1)
        alive(server)


def test_models_are_reloaded_under_load_without_a_failed_request(server: Running, models: Path) -> None:
    second = models.parent / "second"
    second.mkdir()
    save_classifier(second)
    save_detector(second)
    (second / "classifier.onnx").write_bytes(
        (models / "classifier.onnx").read_bytes().replace(b"tiny classifier", b"tiny classifie2")
    )
    damaged = models.parent / "damaged"
    damaged.mkdir()
    (damaged / "classifier.onnx").write_bytes((models / "classifier.onnx").read_bytes()[:200])
    stop, statuses, versions = threading.Event(), Counter(), set()

    def ask_again_and_again() -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                answer = client.post(f"{server.url}/predict", headers=KEY, files={"image": photo_jpeg()})
                statuses[answer.status_code] += 1
                versions.add(answer.json().get("model", {}).get("version"))

    admin = {"X-Admin-Key": ADMIN}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask_again_and_again)
        responses = [
            httpx.post(f"{server.url}/reload", headers=admin, json={"folder": name}, timeout=60)
            for name in ("second", "damaged", "first", "second", "../damaged", "nowhere", "first")
            for _ in range(2)
        ]
        stop.set()
    assert [response.status_code for response in responses] == [
        status for status in (200, 422, 200, 200, 422, 404, 200) for _ in range(2)
    ], [response.text for response in responses]
    assert set(statuses) == {200} and sum(statuses.values()) > 10, statuses
    assert len(versions) == 2, "both models have answered"
    assert "old ones still answer" in responses[2].json()["detail"]
    for headers, status in (({}, 401), (KEY, 401), ({"X-Admin-Key": KEY["X-API-Key"]}, 403)):
        assert httpx.post(f"{server.url}/reload", headers=headers).status_code == status


def test_a_killed_worker_process_is_replaced(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, "", "--workers", "2") as server:
        refused = httpx.post(f"{server.url}/reload", headers={"X-Admin-Key": ADMIN}, timeout=30)
        assert refused.status_code == 409 and f"kill -HUP {server.process.pid}" in refused.json()["detail"]
        workers = [process for process in server.processes()[1:] if "spawn_main" in " ".join(process.cmdline())]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].wait(30)
        outcomes = Counter()
        for _ in range(200):
            try:
                outcomes[send(server, photo_jpeg()).status_code] += 1
            except httpx.TransportError:
                outcomes["connection"] += 1
            if (
                len([process for process in server.processes()[1:] if "spawn_main" in " ".join(process.cmdline())]) == 2
                and outcomes[200] > 20
            ):
                break
            time.sleep(0.05)
        assert set(outcomes) <= {200, "connection"} and outcomes["connection"] <= 1 and outcomes[200] > 20, outcomes
        wait_until_ready(server.url, server.process, server.log)
        alive(server)


def test_sigterm_finishes_running_requests(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, "  upload_idle_seconds: 20\n") as server:
        data = photo_jpeg()
        body = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + data + b"\r\n--x--\r\n"
        )
        line = open_upload(server, len(body))
        line.sendall(
            body[len(b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n') + 2 : -10]
        )
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        line.sendall(body[-10:])
        answer = b""
        while part := line.recv(65_536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200") and b"K-000030" in answer, answer[:300]
        assert server.process.wait(30) in (0, -signal.SIGTERM)
