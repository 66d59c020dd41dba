"""What operates the service: units, rotation, the tunnel, archives of releases, the health watch, several processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import onnx
import psutil
import pytest
import yaml
from serving import ADMIN, free_port, running
from tiny_models import RIGHT as KEY
from tiny_models import save_classifier, save_detector

from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.config.environment import load_environment
from pillsnap.packaging.archive import ArchiveError, check_archive, make_archive, restore_archive, roll_back
from pillsnap.service.guard.auth import weakness

ROOT = Path(__file__).parents[1]
OPERATION = ROOT / "operation"
PAGE = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder)
    save_detector(folder)
    (folder / "classifier.pt2").write_bytes(b"not served")
    (folder / "export_report.json").write_text('{"passed": true}')
    return folder


@pytest.fixture(scope="module")
def other_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks under another name, as if from another training."""
    folder = tmp_path_factory.mktemp("other")
    for task in ("classifier", "detector"):
        model = onnx.load(models / f"{task}.onnx")
        metadata = json.loads(model.metadata_props[0].value)
        onnx.helper.set_model_props(model, {"pillsnap": json.dumps(metadata | {"model": f"other {task}"})})
        onnx.save(model, folder / f"{task}.onnx")
    return folder


def test_the_env_example_must_be_edited_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    names = re.findall(r"^#?([A-Z_]+)=", (tmp_path / ".env").read_text(encoding="utf-8"), re.M)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment = load_environment(tmp_path)
    assert weakness(environment.api_keys) and not environment.allow_weak_keys and environment.model_path is None
    assert {
        "API_KEY",
        "ADMIN_KEY",
        "LOG_LEVEL",
        "LOG_FILE",
        "LOG_FORMAT",
        "CORS_ALLOW_ORIGINS",
        "MODEL_PATH",
        "JOBS_URL",
        "ALLOW_WEAK_KEYS",
        "LAKEFS_ACCESS_KEY_ID",
        "LAKEFS_SECRET_ACCESS_KEY",
    } == set(names)


def unit(name: str, folder: Path) -> Path:
    """A unit whose programs exist on this machine."""
    text = (OPERATION / name).read_text(encoding="utf-8")
    (folder / name).write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
    return folder / name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("name", ["pillsnap.service", "pillsnap-tunnel.service"])
def test_units_are_valid_and_sandboxed(name: str, tmp_path: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit(name, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    exposed = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=yes",
            f"--threshold={30 if name == 'pillsnap.service' else 60}",
            tmp_path / name,
        ],
        capture_output=True,
        text=True,
    )
    assert exposed.returncode == 0, exposed.stdout[-500:]


def test_the_unit_starts_the_documented_command(tmp_path: Path) -> None:
    lines = [
        line.partition("=")[::2]
        for line in (OPERATION / "pillsnap.service").read_text(encoding="utf-8").splitlines()
        if "=" in line and not line.startswith("#")
    ]
    settings = dict(lines)
    program, *words = shlex.split(settings["ExecStart"])
    assert (
        program == "/opt/pillsnap/bin/uvicorn"
        and words[0] == "pillsnap.serve:app"
        and words[words.index("--host") + 1] == "127.0.0.1"
    )
    known = subprocess.run(
        [sys.executable, "-m", "uvicorn", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in known for word in words if word.startswith("--"))
    variables = " ".join(value for name, value in lines if name == "Environment")  # a unit may have several such lines
    given = dict(pair.split("=", 1) for pair in variables.split())
    assert (
        given["MODEL_PATH"] == "/srv/pillsnap/current/models"
        and Path(given["LOG_FILE"]).parent == Path("/var/log") / settings["LogsDirectory"]
    )
    assert settings["RestartPreventExitStatus"] == "3" and int(
        words[words.index("--timeout-graceful-shutdown") + 1]
    ) < int(settings["TimeoutStopSec"])


def test_the_tunnel_forwards_only_the_service() -> None:
    config = yaml.safe_load((OPERATION / "cloudflared.yml").read_text(encoding="utf-8"))
    *rules, last = config["ingress"]
    assert [(rule["hostname"], rule["service"]) for rule in rules] == [("api.pillsnap.co.kr", "http://localhost:8000")]
    assert last == {"service": "http_status:404"}, "cloudflared wants a last rule for everything"


WRITER = """
import logging, sys
from pathlib import Path
from pillsnap.config.environment import Environment
from pillsnap.service.logging import setup_service_logging
setup_service_logging(Environment(log_file=Path(sys.argv[1]), log_format="text"))
for number, _ in enumerate(sys.stdin):
    logging.getLogger("pillsnap").info("line %d.", number)
    print(flush=True)
"""


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="needs logrotate")
def test_logrotate_loses_no_line_of_a_running_service(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir(mode=0o750)
    who = " ".join((psutil.Process().username(), __import__("grp").getgrgid(os.getgid()).gr_name))
    text = (
        (OPERATION / "pillsnap.logrotate")
        .read_text(encoding="utf-8")
        .replace("pillsnap pillsnap", who)
        .replace("/var/log/pillsnap", str(tmp_path / "logs"))
    )
    (tmp_path / "rules").write_text(text)
    (tmp_path / "rules").chmod(0o644)
    command = ["logrotate", "--state", str(tmp_path / "state"), str(tmp_path / "rules")]
    checked = subprocess.run([command[0], "-d", *command[1:]], capture_output=True, text=True)
    assert checked.returncode == 0 and "error" not in checked.stderr, checked.stderr
    file = tmp_path / "logs" / "service.log"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for number in range(60):
        writer.stdin.write("\n")
        writer.stdin.flush()
        writer.stdout.readline()
        if number in (19, 39):
            subprocess.run([command[0], "-f", *command[1:]], check=True)
    writer.communicate(timeout=30)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "service.log",
        "service.log.1",
        "service.log.2.gz",
    ]
    unpacked = subprocess.run(
        ["gzip", "-dc", tmp_path / "logs" / "service.log.2.gz"], capture_output=True, text=True, check=True
    ).stdout
    numbers = re.findall(
        r"line (\d+)\.", unpacked + (tmp_path / "logs" / "service.log.1").read_text() + file.read_text()
    )
    assert numbers == [str(number) for number in range(60)]


def test_documented_commands_and_files_exist() -> None:
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S))
    commands = re.findall(r"^(?:/\S+/)?pillsnap (.+?)(?:  #.*|   +#.*)?$", blocks, re.M) + re.findall(
        r"`pillsnap ([a-z][^`]*)`", PAGE
    )
    assert len(commands) > 8
    for command in commands:
        words = shlex.split(command, comments=True)
        words += {"predict --url": ["http://localhost:8000", "a.jpg"]}.get(command, [])
        cli.parse(words)  # ends the test for a command that does not exist
    for name in re.findall(r"operation/[\w.-]+\w", PAGE):
        assert (ROOT / name).is_file(), name
    assert {path.name for path in OPERATION.iterdir()} <= {
        Path(name).name for name in re.findall(r"operation/[\w.-]+\w", PAGE)
    }
    assert set(re.findall(r"localhost:(\d+)|127\.0\.0\.1:(\d+)", PAGE)) <= {("8000", ""), ("", "8000")}


def command(capfd: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return status, out, err


def test_a_release_is_made_checked_restored_and_rolled_back(
    models: Path, other_models: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    server = tmp_path / "server"
    for name, folder in (("one", models), ("two", other_models)):
        status, out, _ = command(
            capfd,
            "archive",
            "make",
            tmp_path / f"{name}.tar",
            "--model",
            folder,
            "--cfg",
            ROOT / "config.yaml",
            "--note",
            name,
        )
        assert (
            status == 0
            and f": {name}" in out
            and "models/detector.onnx" in out
            and "config.yaml" in out
            and "pt2" not in out
        )
        assert command(capfd, "archive", "check", tmp_path / f"{name}.tar")[:2] == (0, out)
    releases = []
    for name in ("one", "two"):
        status, out, _ = command(capfd, "archive", "restore", tmp_path / f"{name}.tar", "--into", server)
        releases.append(Path(out.strip()))
        assert status == 0 and (server / "current").resolve() == releases[-1].resolve()
    assert (server / "current" / "config.yaml").read_bytes() == (ROOT / "config.yaml").read_bytes()
    assert load_identifier(server / "current" / "models").classify.metadata["model"] == "other classifier"
    assert (releases[1].stat().st_mode & 0o755) == 0o755, "another user may read it"
    for expected in (0, 1, 0):
        status, out, _ = command(capfd, "archive", "rollback", "--into", server)
        assert (
            status == 0
            and Path(out.strip()).resolve() == (server / "current").resolve() == releases[expected].resolve()
        )
    again = command(capfd, "archive", "restore", tmp_path / "one.tar", "--into", server)
    assert (
        again[0] == 0
        and len(list((server / "releases").iterdir())) == 2
        and (server / "previous").resolve() == releases[1].resolve()
    )


def repacked(source: Path, target: Path, change: object) -> Path:
    """An archive with its members changed by `change(name, data)`: a list of (TarInfo, data)."""
    with tarfile.open(source) as archive, tarfile.open(target, "w") as changed:
        for member in archive.getmembers():
            for info, data in change(member, archive.extractfile(member).read()):
                changed.addfile(info, io.BytesIO(data))
    return target


def entry(name: str, data: bytes = b"", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def test_a_changed_archive_is_refused_and_changes_nothing(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    good, server = tmp_path / "good.tar", tmp_path / "server"
    make_archive(models, good)
    restore_archive(good, server)
    before = sorted(str(path) for path in server.rglob("*"))

    def manifest_with(**changes: object) -> object:
        return lambda member, data: [
            entry(
                member.name, json.dumps(json.loads(data) | changes).encode() if member.name == "manifest.json" else data
            )
        ]

    files = check_archive(good)["files"]
    last = "models/export_report.json"
    changes = {
        "another content": lambda member, data: [
            entry(member.name, data.replace(b"true", b"TRUE") if member.name == last else data)
        ],
        "one file less": lambda member, data: [] if member.name == last else [entry(member.name, data)],
        "one file more": lambda member, data: (
            [entry(member.name, data)] + ([entry("models/more", b"x")] if member.name == last else [])
        ),
        "one file twice": lambda member, data: [entry(member.name, data)] * (2 if member.name == last else 1),
        "a link": lambda member, data: [
            entry(member.name, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            if member.name == last
            else entry(member.name, data)
        ],
        "another order": lambda member, data: [] if member.name == "manifest.json" else [entry(member.name, data)],
        "a path outside": manifest_with(files={**files, "../../outside": {"sha256": "0" * 64, "bytes": 0}}),
        "an absolute path outside": manifest_with(files={**files, "/tmp/outside": {"sha256": "0" * 64, "bytes": 0}}),
        "a name of a release": manifest_with(created="../../../outside"),
        "a damaged manifest": manifest_with(files=None),
        "a manifest without a version": manifest_with(pillsnap=None, classes=None, class_map_hash=None),
    }
    for name, change in changes.items():
        with pytest.raises(ArchiveError):
            restore_archive(repacked(good, tmp_path / "changed.tar", change), server)
        status, out, err = command(capfd, "archive", "check", tmp_path / "changed.tar")
        assert (status, out) == (2, "") and len([line for line in err.splitlines() if " INFO " not in line]) == 1, (
            f"{name}: {err}"
        )
    data = good.read_bytes()
    for size in (0, 100, 512, 1500, 3000, data.rindex(b'{"passed"')):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(ArchiveError):
            restore_archive(tmp_path / "cut.tar", server)
    assert sorted(str(path) for path in server.rglob("*")) == before and not list(tmp_path.rglob("outside"))


def test_archive_errors_are_reported(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_PATH", raising=False)
    broken = tmp_path / "broken"
    shutil.copytree(models, broken)
    (broken / "classifier.onnx").write_bytes((models / "classifier.onnx").read_bytes()[:200])
    calls = [
        (("make", "a.tar"), "no model folder"),
        (("make", "a.tar", "--model", broken), "classifier.onnx"),
        (("make",), "take the archive's file"),
        (("rollback", "a.tar", "--into", "."), "rollback takes none"),
        (("check", "missing.tar"), "No such file"),
        (("rollback", "--into", "nowhere"), "no release before"),
        (("restore", "a.tar"), "--into"),
        (("check", "a.tar", "--into", "x"), "--into"),
    ]
    for words, expected in calls:
        status, out, err = command(capfd, "archive", *words)
        assert (status, out) == (2, "") and expected in err, err
    assert not (tmp_path / "a.tar").exists()
    make_archive(models, tmp_path / "a.tar")
    restore_archive(tmp_path / "a.tar", tmp_path / "server")
    assert (
        command(capfd, "archive", "rollback", "--into", "server")[0] == 2 and (tmp_path / "server" / "current").is_dir()
    )


def test_watch_prints_changes_and_exits_with_a_status(capfd: pytest.CaptureFixture) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"ready": true}' if self.server.status == 200 else b'{"detail": "There is no usable model."}'
            self.send_response(self.server.status if self.path == "/ready" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    status, out, _ = command(capfd, "watch", "--url", url, "--once")
    assert status == 1 and "NOT ready, no answer" in out
    server = ThreadingHTTPServer(("127.0.0.1", port), Ready)
    server.status = 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    watching = subprocess.Popen(
        [sys.executable, "-m", "pillsnap", "watch", "--url", url, "--every", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # nohup ignores it
    )
    try:
        assert command(capfd, "watch", "--url", url, "--once")[0] == 0
        assert watching.stdout.readline().rstrip().endswith(f"{url} is ready")
        server.status = 503
        assert "NOT ready, status 503: There is no usable model." in watching.stdout.readline()
        assert command(capfd, "watch", "--url", url, "--once")[0] == 1
        server.status = 200
        assert watching.stdout.readline().rstrip().endswith("is ready")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 130 and watching.stdout.read() == ""
    finally:
        watching.kill()
        watching.stdout.close()
        server.shutdown()
        thread.join()
        server.server_close()
    for words in (("--every", "0"), ("--every", "-1")):
        assert command(capfd, "watch", *words)[0] == 2
    assert command(capfd, "watch", "--url", "nowhere", "--once")[0] == 2


def workers(process: subprocess.Popen) -> set[int]:
    """Worker processes, without zombies and without those that end while they are looked at."""
    found = set()
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def until(condition: Callable[[], object], log: Path) -> object:
    """Wait until a condition is true."""
    ends = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.1)
    return found


def served(url: str) -> str | None:
    """Name of the network that is served; None = no response."""
    try:
        return httpx.get(f"{url}/version", headers={"X-API-Key": KEY}, timeout=30).json()["model"]["classifier"]
    except httpx.HTTPError:
        return None


@pytest.fixture
def archives(models: Path, other_models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two releases; the first is the current one of `server`."""
    for name, folder in (("one", models), ("two", other_models)):
        make_archive(folder, tmp_path / f"{name}.tar")
    restore_archive(tmp_path / "one.tar", tmp_path / "server")
    return tmp_path / "one.tar", tmp_path / "two.tar"


def test_a_service_reloads_a_release_and_a_rollback(archives: tuple[Path, Path], tmp_path: Path) -> None:
    server = tmp_path / "server"
    with running(server / "current" / "models", tmp_path / "work") as started:
        for change, expected in (
            (lambda: restore_archive(archives[1], server), "other classifier"),
            (lambda: roll_back(server), "tiny classifier"),
        ):
            change()
            assert httpx.post(f"{started.url}/reload", headers={"X-Admin-Key": ADMIN}, timeout=60).status_code == 200
            assert served(started.url) == expected


def test_several_processes_restart_one_by_one(archives: tuple[Path, Path], tmp_path: Path) -> None:
    refused, stop = [], threading.Event()
    with running(tmp_path / "server" / "current" / "models", tmp_path / "work", "", "--workers", "2") as started:

        def ask() -> None:
            while not stop.wait(0.05):
                try:
                    httpx.get(f"{started.url}/health", timeout=30)
                except httpx.ConnectError as error:
                    refused.append(repr(error))
                except httpx.TransportError:
                    pass  # a process that ends may end the connections it has

        asking = threading.Thread(target=ask)
        try:
            assert served(started.url) == "tiny classifier"
            first = until(lambda: workers(started.process) if len(workers(started.process)) == 2 else None, started.log)
            restore_archive(archives[1], tmp_path / "server")
            assert httpx.post(f"{started.url}/reload", headers={"X-Admin-Key": ADMIN}, timeout=60).status_code == 409
            asking.start()
            started.process.send_signal(signal.SIGHUP)
            second = until(
                lambda: (
                    workers(started.process)
                    if len(workers(started.process)) == 2 and not workers(started.process) & first
                    else None
                ),
                started.log,
            )
            until(lambda: served(started.url) == "other classifier", started.log)
            stop.set()
            asking.join()
            assert not refused, "the address took requests all the time"
            killed = max(second)
            psutil.Process(killed).kill()
            until(lambda: len(workers(started.process)) == 2 and killed not in workers(started.process), started.log)
            assert until(lambda: served(started.url), started.log) == "other classifier"
        finally:
            stop.set()


def counted(url: str) -> set[float]:
    """How many requests for /version were answered, as eight connections see it."""
    wanted = 'pillsnap_requests_total{route="/version",status="200"} '
    texts = [httpx.get(f"{url}/metrics", headers={"X-API-Key": KEY}, timeout=30).text for _ in range(8)]
    return {float(line.removeprefix(wanted)) for text in texts for line in text.splitlines() if wanted in line}


def test_metrics_add_up_the_counters_of_all_processes(archives: tuple[Path, Path], tmp_path: Path) -> None:
    (temporary := tmp_path / "temporary").mkdir()

    for _ in range(2):
        with running(
            tmp_path / "server/current/models", tmp_path / "work", "", "--workers", "2", TMPDIR=str(temporary)
        ) as started:
            url, log = started.url, started.log
            until(lambda log=log: log.read_text().count("startup complete") == 2, log)
            requests = 0
            while len(list(temporary.glob("*/counter_*.db"))) < 2 or requests < 9:  # both have counted
                assert served(url) == "tiny classifier" and requests < 500
                requests += 1
            until(lambda url=url, requests=requests: counted(url) == {requests}, log)
            psutil.Process(max(workers(started.process))).kill()
            until(lambda log=log: log.read_text().count("startup complete") == 3, log)
            assert counted(url) == {requests}, "what the dead one had counted stays"
            folders = list(temporary.glob("pillsnap-metrics-*"))
            assert len(folders) == 1 and not folders[0].stat().st_mode & 0o077, "those of earlier services are gone"


def test_a_folder_for_metrics_that_is_named_is_made_and_emptied(archives: tuple[Path, Path], tmp_path: Path) -> None:
    models, folder = tmp_path / "server/current/models", tmp_path / "new" / "metrics"
    for _ in range(2):
        with running(models, tmp_path / "work", PROMETHEUS_MULTIPROC_DIR=str(folder)) as started:
            assert served(started.url) == "tiny classifier"
            until(lambda url=started.url: counted(url) == {1.0}, started.log)
    with pytest.raises(AssertionError, match="set PROMETHEUS_MULTIPROC_DIR to a folder"):
        with running(models, tmp_path / "work", PROMETHEUS_MULTIPROC_DIR="/proc/nowhere"):
            pass
