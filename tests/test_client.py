"""`pillsnap predict` and its Python function, against a real server and against one that is busy, wrong or gone."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pillow_heif
import pytest
from PIL import Image
from serving import free_port, running
from tiny_models import RIGHT as KEY
from tiny_models import photo_jpeg

from pillsnap import cli
from pillsnap.service.client.photos import ClientError, ServerUnusable
from pillsnap.service.client.remote import predict_remote
from pillsnap.service.client.table import as_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two photos of two pills, one of them in a subfolder, and files that are no photos."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "더 깊은").mkdir()
    (folder / "one.jpg").write_bytes(photo_jpeg())
    Image.open(io.BytesIO(photo_jpeg())).save(folder / "더 깊은" / "둘.PNG")
    (folder / "list.txt").write_text("no photo")
    (folder / ".one.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real service."""
    with running(models, tmp_path_factory.mktemp("server")) as started:
        yield started.url


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without a project, and the API key of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("MODEL_PATH", raising=False)


def run(capfd: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """Status, output and error stream of `pillsnap predict`."""
    status = cli.main(["predict", *map(str, words)])
    out, err = capfd.readouterr()
    assert "Traceback" not in err and KEY not in out + err
    return status, out, err


def test_a_local_model_and_a_server_return_the_same(
    photos: Path, models: Path, server: str, capfd: pytest.CaptureFixture
) -> None:
    results = {}
    for backend in (("--model", models), ("--url", server)):
        status, out, _ = run(capfd, photos / "one.jpg", *backend, "--pipeline", "combo", "--json")
        results[backend[0]] = json.loads(out)
        assert (
            status == 0
            and results[backend[0]].pop("file") == str(photos / "one.jpg")
            and results[backend[0]].pop("timings_ms")["total"] > 0
        )
    assert results["--model"] == results["--url"] and [pill["code"] for pill in results["--url"]["pills"]] == [
        "K-000030",
        "K-000007",
    ]


@pytest.mark.parametrize("backend", ["local", "remote"])
def test_photos_become_a_table_and_a_progress_bar_on_stderr(
    backend: str, photos: Path, models: Path, server: str, capfd: pytest.CaptureFixture
) -> None:
    status, out, err = run(
        capfd, photos, photos / "one.jpg", *(("--model", models) if backend == "local" else ("--url", server))
    )
    rows = out.splitlines()
    assert (
        status == 0
        and rows[0].split() == ["photo", "pill", "K-code", "name", "confidence", "verdict"]
        and "3/3" in err
        and "3/3" not in out
    )
    assert [
        row
        for row in rows
        if row.startswith(str(photos / "one.jpg"))
        and "K-000030" in row
        and "White round tablet" in row
        and row.endswith("identified")
    ]
    assert (
        any(str(photos / "더 깊은" / "둘.PNG") in row for row in rows)
        and "list.txt" not in out
        and ".one.jpg" not in out.replace("/one.jpg", "")
    )
    assert sum("combo names them all" in row for row in rows) == 3


def test_top_k_limits_the_candidates(photos: Path, models: Path, server: str, capfd: pytest.CaptureFixture) -> None:
    for backend in (("--model", models), ("--url", server)):
        _, out, _ = run(capfd, photos / "one.jpg", *backend, "--json", "--top-k", 2)
        candidates = [candidate["code"] for candidate in json.loads(out)["pills"][0]["candidates"]]
        assert len(candidates) == 2 and candidates[0] == "K-000030"
    for wrong in ("0", "21"):
        status, _, err = run(capfd, photos / "one.jpg", "--model", models, "--top-k", wrong)
        assert status == 2 and "1 to 20" in err


def test_out_gets_the_whole_output(photos: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(capfd, photos, "--model", models, "--json", "--out", tmp_path / "deep" / "answers.jsonl")[:2] == (0, "")
    lines = (tmp_path / "deep" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Path(json.loads(line)["file"]).name for line in lines] == ["one.jpg", "둘.PNG"]
    assert run(capfd, photos, "--model", models, "--out", tmp_path / "table.txt")[:2] == (0, "") and "K-000030" in (
        tmp_path / "table.txt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["local", "remote"])
def test_a_photo_that_fails_does_not_stop_the_others(
    backend: str, photos: Path, models: Path, server: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    whole = (photos / "one.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "letter.txt").write_text("Dear pharmacist")
    bad = [tmp_path / name for name in ("cut.jpg", "empty.jpg", "letter.txt", "missing.jpg")]
    status, out, err = run(
        capfd, *bad, photos / "one.jpg", *(("--model", models) if backend == "local" else ("--url", server)), "--json"
    )
    assert status == 1 and [Path(json.loads(line)["file"]).name for line in out.splitlines()] == ["one.jpg"]
    for path, word in zip(bad, ("damaged", "empty", "JPEG", "no such file"), strict=True):
        assert (
            sum(line.startswith(f"{path}: ") and word in line for line in err.replace("\r", "\n").splitlines()) == 1
        ), err


def test_a_folder_of_a_phone_is_read_by_content_and_what_is_skipped_is_named(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    pillow_heif.register_heif_opener()
    folder, photo = tmp_path / "phone", Image.open(io.BytesIO(photo_jpeg()))
    folder.mkdir()
    for name, kind in {"a.jpg": "HEIF", "b.HEIC": "HEIF", "c.jfif": "JPEG", "d.avif": "AVIF", "e.dat": "PNG"}.items():
        photo.save(folder / name, kind)
    good = ["a.jpg", "b.HEIC", "c.jfif", "d.avif", "e.dat"]
    status, out, err = run(capfd, folder, "--model", models, "--json")
    assert status == 0 and [Path(json.loads(line)["file"]).name for line in out.splitlines()] == good
    (folder / "f.png").write_bytes(b"")
    (folder / "g.jpg").write_bytes((folder / "c.jfif").read_bytes()[:2000] + b"\xff\xd9")
    (folder / "list.txt").write_text("no photo")
    status, out, err = run(capfd, folder, "--model", models, "--json")
    assert status == 1 and [Path(json.loads(line)["file"]).name for line in out.splitlines()] == good
    lines = err.replace("\r", "\n").splitlines()[-4:]
    assert "2" in lines[0] and lines[1].startswith(f"{folder / 'f.png'}: ") and "damaged" in lines[2]
    assert lines[2].startswith(f"{folder / 'g.jpg'}: ") and "list.txt" in lines[3]


def test_wrong_arguments_get_one_sentence(
    photos: Path,
    models: Path,
    server: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    photo = photos / "one.jpg"
    calls = [
        ((photo,), "--model"),
        ((photo, "--model", tmp_path / "nowhere"), "model folder"),
        ((tmp_path / "empty", "--model", models), "no photo in"),
        ((photo, "--url", server, "--model", models), "leave one out"),
        ((photo, "--url", f"http://127.0.0.1:{free_port()}"), "can't be reached"),
        ((photo, "--url", "localhost:8000"), "is no address"),
        ((photo, "--url", "http://"), "is no address"),
        ((photo, "--url", "http://localhost:99999"), "is no address"),
        ((photo, "--url", f"{server}/?pipeline=combo"), "is no address"),
        ((photo, "--url", f"{server}/elsewhere"), "404"),
        ((photo, "--url", server.replace("http:", "https:")), "can't be reached"),
    ]
    for words, expected in calls:
        status, out, err = run(capfd, *words)
        assert (
            (status, out) == (2, "")
            and expected in err
            and len([line for line in err.splitlines() if line.startswith("pillsnap:")]) == 1
            and "Traceback" not in err
        ), err
    for key, expected in (
        ("a-wrong-key-of-some-length", "key is wrong"),
        ("a-wrong-key-of-some-length", f"{server} takes the keys of its own API_KEY: set API_KEY in .env"),
        ("", "key is missing"),
        ("", f"{server} takes the keys of its own API_KEY: set API_KEY in .env or the environment"),
        ("schlüssel", "characters that no key has"),
    ):
        monkeypatch.setenv("API_KEY", key)
        status, out, err = run(capfd, photo, photo, "--url", server)
        assert (status, out) == (2, "") and err.count(expected) == 1 and (not key or key not in err), err


def test_a_pasted_address_of_an_endpoint_is_the_address_of_its_server(
    photos: Path, server: str, capfd: pytest.CaptureFixture
) -> None:
    for path in ("/predict", "/predict/", "/docs", "/health", "/batch", "/"):
        status, out, err = run(capfd, photos / "one.jpg", "--url", f"{server}{path}")
        assert status == 0 and "K-000030" in out, err
        assert cli.main(["watch", "--once", "--url", f"{server}{path}"]) == 0
        assert capfd.readouterr().out.endswith(f" {server} is ready\n")


@pytest.mark.parametrize(
    "url", ["nonsense", "localhost:8000", "ftp://localhost", "http://", "http://a b", "http://:80", ""]
)
def test_watch_refuses_what_is_no_address(url: str, capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["watch", "--once", "--url", url]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "is no address of a server: write it like http://" in err


class Busy(BaseHTTPRequestHandler):
    """Sends the next response of its server's list."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.server.responses.pop(0)
        self.server.seen.append(self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def busy() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    server.responses, server.seen = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = json.dumps({"pipeline": "single", "pills": [], "notes": ["No pill was found in the photo."]}).encode()
LATER = (
    429,
    {"Retry-After": "1"},
    json.dumps(
        {
            "detail": "This key has made 60 requests within a minute: ask again in 1 seconds.",
            "code": "too_many_requests",
            "request_id": "a" * 32,
        }
    ).encode(),
)
FULL = (
    503,
    {"Retry-After": "1"},
    json.dumps({"detail": "Too many photos are waiting.", "code": "busy", "request_id": "b" * 32}).encode(),
)


def test_a_busy_server_is_retried_until_patience_ends(busy: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{busy.server_port}"
    busy.responses = [LATER, FULL, (200, {}, GOOD)]
    assert predict_remote(url, KEY, b"photo", "combo", top_k=3) == json.loads(GOOD)
    assert len(busy.seen) == 3 and set(busy.seen) == {"/predict?pipeline=combo&top_k=3"}
    busy.responses, busy.seen = [LATER] * 9, []
    with pytest.raises(ServerUnusable, match="60 requests .*status 429, request a{32}"):
        predict_remote(url, KEY, b"photo", patience=2)
    assert len(busy.seen) == 3
    busy.responses, busy.seen = [(503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, FULL[2])], []
    with pytest.raises(ServerUnusable, match="waiting"):
        predict_remote(url, KEY, b"photo")
    busy.responses = [
        (
            503,
            {},
            json.dumps({"detail": "There is no usable model.", "code": "no_model", "request_id": "c" * 32}).encode(),
        )
    ]
    with pytest.raises(ServerUnusable, match="no usable model"):
        predict_remote(url, KEY, b"photo")


@pytest.mark.parametrize(
    "answer",
    [
        (502, {}, b"<html>Bad gateway</html>"),
        (200, {}, b"hello"),
        (200, {}, b"[]"),
        (200, {}, b"\xff\xfe{"),
        (422, {}, b'{"detail": [{"loc": []}]}'),
        (301, {"Location": "https://elsewhere.example/"}, b""),
    ],
)
def test_other_servers_are_recognized(answer: tuple, busy: ThreadingHTTPServer) -> None:
    busy.responses = [answer]
    with pytest.raises(
        ServerUnusable, match="is it the address of a pillsnap server|has moved to https://elsewhere.example/"
    ):
        predict_remote(f"http://127.0.0.1:{busy.server_port}", KEY, b"photo")


def test_disconnect_or_timeout_fails_one_photo(photos: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClientError, match="ended the connection") as error:
            predict_remote(url, KEY, photos / "one.jpg")
        thread.join()
        assert not isinstance(error.value, ServerUnusable)
        with httpx.Client(timeout=0.3) as impatient, pytest.raises(ClientError, match="did not answer in time"):
            predict_remote(url, KEY, photos / "one.jpg", client=impatient)


def test_a_table_keeps_its_columns_under_hangul() -> None:
    pill = {"code": "K-000030", "name": "예시정 10밀리그램", "confidence": 0.97, "verdict": "identified"}
    table = as_table(
        [
            (Path("a.jpg"), {"pills": [pill, {**pill, "name": "Example"}]}),
            (Path("empty.jpg"), {"pills": [], "notes": ["No pill was found."]}),
        ]
    )
    rows = table.splitlines()
    width = lambda text: sum(2 if ord(letter) > 0x1100 else 1 for letter in text)  # noqa: E731
    assert len({width(row[: row.index("97%")]) for row in rows if "97%" in row}) == 1
    assert rows[-1] == "empty.jpg: No pill was found." and "no pill was found" in rows[-2]


def test_the_example_works(photos: Path, server: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "predict.py"), str(photos / "one.jpg"), server]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "K-000030 White round tablet 99%",
        "K-000007 Red capsule 99%",
    ], done.stderr
    refused = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "API_KEY": "wrong"}, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "key is wrong" in refused.stderr and "Traceback" not in refused.stderr


def test_the_client_imports_no_training_packages(photos: Path, server: str) -> None:
    check = (
        "import sys\nfrom pathlib import Path\nfrom pillsnap.service.client.remote import predict_remote\n"
        f"predict_remote({server!r}, {KEY!r}, Path({str(photos / 'one.jpg')!r}))\n"
        "print(sorted({'torch', 'polars', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
