"""Shipped files work where they arrive: in the container, as a package of the model hub, as an archive of SageMaker."""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import httpx
import pytest
import yaml
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pillsnap import cli
from pillsnap.answer.factory import load_identifier
from pillsnap.config.load import load_settings
from pillsnap.data.manifest import load_dataset
from pillsnap.evaluation.evaluate import evaluate_run
from pillsnap.export.report import export_run
from pillsnap.packaging.hub import build_package
from pillsnap.packaging.sagemaker import build_archive
from pillsnap.packaging.shipped import ShipError
from pillsnap.runtime.images import decode_image

ROOT = Path(__file__).parents[1]
# Prepended to a program: packages that are installed here but not at the destination can't be imported.
ONLY = """
import importlib.util
import sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name
allowed, owners = set({allowed!r}), packages_distributions()

class AllowedOnly:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in owners and not allowed & set(map(canonicalize_name, owners[top])):
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not installed there", name=top)

sys.meta_path.insert(0, AllowedOnly())
there = importlib.util.find_spec

def find_spec(name, package=None):
    try:
        return there(name, package)
    except ModuleNotFoundError:
        return None  # for packages that only test for another one

importlib.util.find_spec = find_spec
"""


def with_dependencies(names: list[str]) -> list[str]:
    """These distributions and all that they depend on."""
    found, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            needed = map(Requirement, requires(name) or [])
        except PackageNotFoundError:
            continue
        waiting += [need for need in needed if not need.marker or need.marker.evaluate({"extra": ""})]
    return sorted(found)


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run, evaluated and exported."""
    folder = tmp_path_factory.mktemp("ship") / "run"
    shutil.copytree(trained_run, folder, ignore=shutil.ignore_patterns("export*"))
    settings = load_settings(folder / "config.yaml")
    evaluate_run(folder, settings)
    assert export_run(folder, settings, ["safetensors"])["passed"]
    return folder


@pytest.fixture(scope="module")
def photo(run: Path) -> Path:
    return Path(load_dataset(run).manifest["image"][0])


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments."""
    lines = [
        line
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def last(name: str, instruction: str) -> str:
    """The arguments of the last such instruction."""
    return [arguments for found, arguments in instructions(name) if found == instruction][-1]


def installed_by(name: str) -> list[str]:
    """Arguments of the first `pip install` of a Dockerfile; "." is the package, .[extra] one of its extras."""
    command = next(
        arguments for found, arguments in instructions(name) if found == "RUN" and "pip install" in arguments
    )
    assert "--constraint constraints.txt" in command
    requested = command.partition("--constraint constraints.txt")[2].replace("'", "").split()
    defaults = dict(words.replace('"', "").split("=", 1) for found, words in instructions(name) if found == "ARG")
    return " ".join(defaults[word[1:]] if word.startswith("$") else word for word in requested).split()


def settings_ini(key: str) -> list[str]:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"][key].split()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.train"])
def test_images_are_built_from_git_and_run_without_root(name: str):
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert name in tracked
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [
        source
        for found, words in instructions(name)
        if found == "COPY" and "--from" not in words
        for source in words.split()[:-1]
    ]
    assert {"pillsnap", "setup.py", "settings.ini", "constraints.txt"} <= set(sources)
    for source in sources:
        assert any(file == source or file.startswith(f"{source}/") for file in tracked), f"{source} is not in git"
        assert "*" in ignored and f"!{source}" in ignored, f"{source} is not sent to the builder"
    user = last(name, "USER")
    assert user not in ("0", "root") and any(
        found == "RUN" and f"--uid {user} " in arguments for found, arguments in instructions(name)
    )


def test_training_image_has_cuda_and_all_requirements():
    assert last("Dockerfile.train", "FROM").startswith("nvidia/cuda:13.")
    assert installed_by("Dockerfile.train") == [".[train,formats,jobs]"]
    assert json.loads(last("Dockerfile.train", "CMD")) == ["python", "-m", "pillsnap", "train"]


def test_compose_reserves_a_gpu_and_keeps_the_key_out():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    (device,) = services["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${GPUS:-1}", "capabilities": ["gpu"]}
    assert "deploy" not in services["serve"] and services["serve"]["environment"]["API_KEY"] == "${API_KEY:-}"
    assert (
        services["serve"]["volumes"][0]["target"]
        == dict(pair.split("=", 1) for pair in last("Dockerfile", "ENV").split())["MODEL_PATH"]
        == "/models"
    )
    for service in (service for service in services.values() if "build" in service):
        assert (
            "CUDA_VISIBLE_DEVICES" in service["environment"] and service["environment"]["CUDA_VISIBLE_DEVICES"] is None
        ), "an empty value would switch the GPU off"
        build = service["build"] if isinstance(service["build"], dict) else {}
        assert (ROOT / build.get("dockerfile", "Dockerfile")).is_file()
    assert all(
        any(volume.endswith(place) for volume in services["train"]["volumes"])
        for place in (":/app/data", ":/app/models", ":/app/runs", ":/photos:ro")
    )


def test_compose_has_a_worker_with_a_gpu_that_shares_its_files():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    worker, redis = services["worker"], services["redis"]
    assert worker["command"].split() == "celery -A pillsnap.scale.worker worker -Q ml_tasks".split()
    assert worker["deploy"] == services["train"]["deploy"] and worker["environment"]["MODEL_PATH"] == "/models"
    assert "jobs:/app/data/jobs" in worker["volumes"] and "jobs:/app/data/jobs" in services["serve"]["volumes"]
    assert worker["environment"]["JOBS_URL"] == "${JOBS_URL:-redis://redis:6379/0}" and "ports" not in redis
    assert "--appendonly yes" in redis["command"] and {"jobs", "redis"} <= set(compose["volumes"])
    assert {one.get("profiles", [""])[0] for one in (worker, redis)} == {"jobs"}
    for name in ("Dockerfile", "Dockerfile.train"):
        made = " ".join(words for found, words in instructions(name) if found == "RUN")
        assert "data/jobs" in made.partition("useradd")[2], "a volume takes its owner from the image"


def test_compose_starts_what_a_profile_names():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]

    def started(profile: str) -> set[str]:
        return {name for name, service in services.items() if profile in service.get("profiles", [profile])}

    assert started("local-lakefs") == {"lakefs", "mlflow"} and started("jobs") == {"serve", "worker", "redis"}
    assert not started("no profile"), "`docker compose up SERVICE` starts the one that it names"
    assert "mlflow:5000" in services["mlflow"]["command"]


def test_compose_starts_lakefs_and_mlflow_only_when_asked():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    found = {name: one for name, one in compose["services"].items() if one.get("profiles") == ["local-lakefs"]}
    assert {name: one["image"].rpartition(":")[2] for name, one in found.items()} == {
        "lakefs": "1.86.0",
        "mlflow": "v3.17.2",
    }
    for name, service in found.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["volumes"][0].partition(":")[0] in compose["volumes"], name
    keys = [value for name, value in found["lakefs"]["environment"].items() if "KEY" in name]
    assert keys and all(value.startswith("${LAKEFS_") for value in keys), "keys come from the environment"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_serving_image_needs_only_its_requirements(run: Path, photo: Path, tmp_path: Path):
    """Run its command and its health check with no packages but those that it installs."""
    requested = installed_by("Dockerfile")
    assert requested == [".", "openvino", "celery", "redis"] and "torch" not in (
        allowed := with_dependencies([*settings_ini("requirements"), *requested[1:]])
    )
    port = free_port()
    command = [
        word.replace("8000", str(port)).replace("0.0.0.0", "127.0.0.1")
        for word in json.loads(last("Dockerfile", "CMD"))
    ]
    check = last("Dockerfile", "HEALTHCHECK").partition("CMD")[2].replace(":8000", f":{port}")
    check = [sys.executable, *json.loads(check)[1:]]
    assert command[:2] == ["uvicorn", "pillsnap.serve:app"] and str(port) in command and "/health" in check[-1]
    program = (
        ONLY.format(allowed=[*allowed, "pillsnap"])
        + f"import runpy\nsys.argv = {command!r}\nrunpy.run_module('uvicorn', run_name='__main__')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MODEL_PATH": str(run / "export"),
        "API_KEY": "jC2-9wqXr_LmT4vYd0Ks",
    }
    assert subprocess.run(check, capture_output=True).returncode != 0, "nothing listens yet"
    server = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        ends = time.monotonic() + 60
        while subprocess.run(check, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < ends, (
                server.stderr.read() if server.poll() is not None else "no answer"
            )
            time.sleep(0.2)
        address = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"
        answer = httpx.post(
            f"{address}/predict",
            headers={"X-API-Key": environment["API_KEY"]},
            files={"image": photo.read_bytes()},
            timeout=30,
        )
        assert answer.status_code == 200 and len(answer.json()["pills"]) == 1
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()


def test_import_check_detects_missing_packages():
    program = ONLY.format(allowed=["packaging"]) + "import torch\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "it is not installed there" in done.stderr


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs: repositories, large files, commits."""

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> None:
        data, server = self.body(), self.server
        endpoint = f"http://127.0.0.1:{server.server_port}"
        if self.headers.get("Authorization") != "Bearer hf_example":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            requested = json.loads(data)
            server.made.append(requested)
            self.answer(
                {"url": f"{endpoint}/{requested['organization']}/{requested['name']}"},
                200 if len(server.made) == 1 else 409,
            )
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(data)["files"]
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith((".onnx", ".safetensors")) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**entry, "actions": {"upload": {"href": f"{endpoint}/upload/{entry['oid']}"}}}
                        for entry in objects
                    ],
                }
            )
        elif "/commit/" in self.path:
            for entry in map(json.loads, data.splitlines()):
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    server.files[entry["value"]["path"]] = server.large[entry["value"]["oid"]]
            self.answer({"commitUrl": f"{endpoint}/someone/pills/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({"error": f"no such place: {self.path}"}, 404)

    def log_message(self, *words: object) -> None:
        """Disable the log."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.large, server.files = [], {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ship_hub(
    run: Path, out: Path, endpoint: str, *more: str, token: str | None = "hf_example"
) -> subprocess.CompletedProcess:
    """Run `pillsnap ship hub` with an address and a token of the Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(out.parent / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }
    return subprocess.run(
        [sys.executable, "-m", "pillsnap", "ship", "hub", "--run", str(run), "--out", str(out), *more],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
    )


def test_upload_has_only_the_package(run: Path, hub: ThreadingHTTPServer, tmp_path: Path):
    out = tmp_path / "package"
    out.mkdir()
    (out / "private.txt").write_text("not to be uploaded")
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    for _ in range(2):  # the second time the repository is there
        done = ship_hub(run, out, endpoint, "--repo", "someone/pills")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{endpoint}/someone/pills"
    assert hub.made[0] == {"name": "pills", "organization": "someone", "visibility": "private"}
    names = {
        f"{task}.{ending}" for task in ("classifier", "detector") for ending in ("onnx", "safetensors", "json")
    } | {"README.md", "config.json"}
    assert hub.files == {name: (out / name).read_bytes() for name in names}
    (tmp_path / "there").mkdir()
    for name, data in hub.files.items():
        (tmp_path / "there" / name).write_bytes(data)
    assert load_identifier(tmp_path / "there").rules == load_identifier(run / "export").rules


def test_failed_uploads_give_one_sentence(run: Path, hub: ThreadingHTTPServer, tmp_path: Path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    out, repo = tmp_path / "package", ("--repo", "someone/pills")
    closed = f"http://127.0.0.1:{free_port()}"
    for done, words in (
        (ship_hub(run, out, endpoint, *repo, token=None), "no token"),
        (ship_hub(run, out, endpoint, *repo, token="hf_wrong"), "the token may not write there, or is wrong"),
        (ship_hub(run, out, closed, *repo), "can't be reached"),
        (ship_hub(run, out, endpoint, "--repo", "not/a/name"), "write USER/NAME"),
    ):
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not hub.files


def test_card_has_measured_values_and_no_paths(run: Path, tmp_path: Path):
    names = build_package(run, tmp_path)
    card, evaluation = (
        ModelCard.load(tmp_path / "README.md"),
        json.loads((run / "evaluation.json").read_text(encoding="utf-8")),
    )
    assert (card.data.license, card.data.library_name) == (
        "agpl-3.0",
        "pillsnap",
    ) and "pill-identification" in card.data.tags
    measured, compared = re.search(r"## Measured\n(.*?)\n## .*?## Compared[^\n]*\n(.*?)\n## ", card.text, re.S).groups()
    rows = [line.strip("| ").split(" | ") for line in measured.splitlines() if line.startswith("| ")][1:]
    known = {
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        for part in ("single", "combo", "latency")
        for value in evaluation[part].values()
        if not isinstance(value, str)
    }
    assert len(rows) >= 10 and {value for _, _, value in rows} <= known
    assert ["one pill", "top-1", f"{evaluation['single']['top1']:.4g}"] in rows
    report = json.loads((run / "export" / "export_report.json").read_text(encoding="utf-8"))["formats"]
    assert (
        f"| classifier, onnx | mean squared difference of the logits | {report['onnx']['classifier']['mse']:.4g} |"
        in compared
    )
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["rules"] == load_identifier(tmp_path).rules.to_json() and set(config["networks"]) == {
        "classifier",
        "detector",
    }
    for name in ("README.md", "config.json"):
        assert str(run.parent) not in (tmp_path / name).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (run / "evaluation.json").rename(run / "evaluation.aside")
    try:
        build_package(run, tmp_path)
        assert "not evaluated" in (tmp_path / "README.md").read_text(encoding="utf-8")
    finally:
        (run / "evaluation.aside").rename(run / "evaluation.json")


def test_failed_files_are_not_shipped(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = tmp_path / "run"
    shutil.copytree(run / "export", copy / "export")
    report = json.loads((copy / "export" / "export_report.json").read_text(encoding="utf-8"))
    report["formats"]["safetensors"]["passed"] = False
    (copy / "export" / "export_report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(ShipError, match="safetensors files .* have failed"):
        build_package(copy, tmp_path / "package")
    del report["formats"]["safetensors"]
    (copy / "export" / "export_report.json").write_text(json.dumps(report), encoding="utf-8")
    assert cli.main(["ship", "hub", "--run", str(copy), "--out", str(tmp_path / "package")]) == 2
    assert "--format safetensors" in capsys.readouterr().err
    (copy / "export" / "detector.onnx").unlink()
    assert cli.main(["ship", "sagemaker", "--run", str(copy), "--out", str(tmp_path / "model.tar.gz")]) == 2
    assert "lacks detector.onnx" in capsys.readouterr().err
    assert (
        cli.main(
            ["ship", "sagemaker", "--run", str(run), "--out", str(tmp_path / "model.tar.gz"), "--repo", "someone/pills"]
        )
        == 2
    )
    assert not (tmp_path / "package").exists() and not (tmp_path / "model.tar.gz").exists()


ENDPOINT = """
import importlib.util, json
from pathlib import Path

folder, photo = Path({folder!r}), Path({photo!r}).read_bytes()
spec = importlib.util.spec_from_file_location("inference", folder / "code/inference.py")
inference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inference)
import pillsnap
assert Path(pillsnap.__file__).is_relative_to(folder), pillsnap.__file__


class Context:  # what SageMaker's toolkit passes to a function that takes it
    def __init__(self, attributes):
        self.request_processor = [self]
        self.attributes = attributes

    def get_request_properties(self):
        return {{"Content-Type": "image/png", "X-Amzn-SageMaker-Custom-Attributes": self.attributes}}


def request(body, content_type, *context):
    try:
        prediction = inference.predict_fn(inference.input_fn(body, content_type, *context), model)
        return json.loads(inference.output_fn(prediction, "application/json")[0])
    except ValueError as error:
        return [error.status_code, str(error)]


model = inference.model_fn(str(folder))
print(json.dumps([
    request(photo, "image/png"),
    request(photo, "application/x-image", Context("trace=1, pipeline=combo")),
    request(photo, "image/png", Context("pipeline=both")),
    request(photo, "text/csv"),
    request(b"a letter", "image/jpeg"),
    request(photo[:1000], "image/png"),
    request(b"", "image/png"),
]))
"""


def call_endpoint(folder: Path, photo: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the code of an unpacked archive with only its requirements installed."""
    allowed = with_dependencies((folder / "code" / "requirements.txt").read_text(encoding="utf-8").split())
    program = ONLY.format(allowed=[*allowed, "pillsnap", "packaging"]) + ENDPOINT.format(
        folder=str(folder), photo=str(photo)
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PILLSNAP_PIPELINE")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **variables},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )


def test_unpacked_archive_works_with_the_toolkit(run: Path, photo: Path, tmp_path: Path):
    assert cli.main(["ship", "sagemaker", "--run", str(run), "--out", str(tmp_path / "model.tar.gz")]) == 0
    folder = tmp_path / "model"
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    done = call_endpoint(folder, photo)
    assert done.returncode == 0, done.stderr
    single, combo, unknown, csv, letter, cut, empty = json.loads(done.stdout)
    identifier, image = load_identifier(run / "export"), decode_image(photo)
    for answer, pipeline in ((single, "single"), (combo, "combo")):
        expected = identifier.identify(image, pipeline).to_json()
        assert answer["pipeline"] == pipeline and [pill["code"] for pill in answer["pills"]] == [
            pill["code"] for pill in expected["pills"]
        ]
    assert [refusal[0] for refusal in (unknown, csv, letter, cut, empty)] == [400, 415, 415, 422, 415]
    assert (
        "single (one pill) or combo" in unknown[1]
        and "image/jpeg, image/png, application/x-image" in csv[1]
        and "cut off" in cut[1]
    )
    assert json.loads(call_endpoint(folder, photo, PILLSNAP_PIPELINE="combo").stdout)[0]["pipeline"] == "combo"
    wrong = call_endpoint(folder, photo, PILLSNAP_PIPELINE="both")
    assert wrong.returncode and "the variable PILLSNAP_PIPELINE is unknown" in wrong.stderr


def test_archive_is_reproducible(run: Path, tmp_path: Path):
    names = build_archive(run, tmp_path / "first.tar.gz")
    for path in (run / "export").iterdir():
        os.utime(path, (1, 1))
    build_archive(run, tmp_path / "second.tar.gz")
    assert (tmp_path / "first.tar.gz").read_bytes() == (tmp_path / "second.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "first.tar.gz") as archive:
        members = archive.getmembers()
        pins = archive.extractfile("code/requirements.txt").read().decode().split()
    assert [member.name for member in members] == names and {
        "classifier.onnx",
        "detector.onnx",
        "code/inference.py",
        "code/pillsnap/packaging/sagemaker_handler.py",
    } <= set(names)
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o644)}
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-").splitlines()
    assert all(pin.lower().replace("_", "-") in tested for pin in pins)
