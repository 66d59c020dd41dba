"""The GPU check as a dry run, in an environment that holds only what a bare machine with a card holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pillsnap import cli
from pillsnap.bench.gpu import main as gpu
from pillsnap.bench.gpu import parts as gpu_parts
from pillsnap.bench.report import goal

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "operation" / "gpu-wheels.txt"
THERE = ["torch", "timm", "numpy", "pandas", "pillow", "opencv-python-headless", "onnxruntime-gpu"]
REASONS = (  # why a processor can't show something
    "torch finds no NVIDIA card",
    "float16 training is not for processors",
    "there is no GPU",
    "a dry run does not compile",
    "does not offer it",
    "the check uses one",
)


def pins(file: Path) -> dict[str, str]:
    """Version by name."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def with_requirements(names: list[str]) -> set[str]:
    """Packages, and what they require."""
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            requirements = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue  # of another system
        found.add(name)
        waiting += [item.name for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that imports what the machine has and the wheels of the list, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name in with_requirements(THERE) | set(pins(WHEELS)):
        for top in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists() and not top.endswith(".pth"):
                link.symlink_to(distribution(name).locate_file(top))
    return folder / "bin" / "python"


def test_the_wheels_are_those_of_the_project():
    listed, known = pins(WHEELS), pins(ROOT / "constraints.txt")
    assert listed == {name: known[name] for name in listed} and "ultralytics-opencv-headless" in listed
    assert not {"polars", "torch", "scikit-learn", "scipy"} & set(listed)


def test_a_dry_run_from_a_bare_environment(bare: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([bare, "-c", "import polars"], capture_output=True, env=environment).returncode
    done = subprocess.run(
        [bare, "-m", "pillsnap.bench.gpu.main", "--dry", "--out", tmp_path / "out", "--revision", "given"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=450,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-dry.json"]
    report = json.loads((tmp_path / "out" / "gpu-dry.json").read_text(encoding="utf-8"))
    assert report["benchmark"] == "gpu" and report["setup"]["dry"] and report["revision"]
    assert list(report["parts"]) == list(gpu.PARTS)
    not_shown = [item for part in report["parts"].values() for item in part["not_shown"]]
    unexpected = [item for item in not_shown if not any(reason in item["reason"] for reason in REASONS)]
    assert not unexpected
    tests = report["parts"]["tests"]["values"]["tests"]
    assert tests["failed"] == {} and tests["passed"] >= 10
    measured = {item["name"] for item in report["goals"] if item["value"] is not None}
    assert {
        "tests that pass",
        "classifier over limit, memory",
        "detector waiting for data, hotset",
        "answer, onnxruntime, p95 ms",
        "color, NILUT, ms",
        "classifier over timm",
        "detector over ultralytics",
    } <= measured
    for line in ("tests that pass", "classifier over limit, hotset", "goals met", "gpu-dry.json"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "torch finds no NVIDIA card"),
        (["--dry", "--only", "colours"], "there is no part 'colours'"),
        (["--dry", "train.lr=fast"], "train.lr"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([*words, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert message in line and len(line.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_part_that_takes_too_long_is_killed_and_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As max-autotune may: the report says which part was over."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom pillsnap.bench.gpu.parts import Findings\n"
        "found = Findings(Path(sys.argv[-1]) / 'classifier.json')\nfound.plan('classifier, bf16', 'classifier, slow')\n"
        "found.show('classifier, bf16', 1.0, '1.0')\ntime.sleep(60)\n"
    )
    (tmp_path / "slow.py").write_text(script)
    limited = gpu.run_limited
    monkeypatch.setattr(
        gpu,
        "run_limited",
        lambda command, seconds, environment: limited([sys.executable, str(tmp_path / "slow.py"), command[-2]], 10),
    )
    options = gpu.parse(["--dry", "--only", "classifier"])
    report = gpu.check_gpu(options, tmp_path / "gpu-dry.json")
    assert report["parts"]["classifier"]["values"] == {"classifier, bf16": 1.0}
    missing = [{"name": "classifier, slow", "reason": "its 10 seconds were over."}]
    assert report["parts"]["classifier"]["not_shown"] == missing
    assert json.loads((tmp_path / "gpu-dry.json").read_text()) == report and "classifier, slow" in gpu.table(report)


def test_a_run_of_some_parts_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The compiler's part is left out of a run of all parts, where it gets the time that is left: none here."""
    measured: list[str] = []
    clock = 0.0

    def run(command: list[str], seconds: float, environment: dict[str, str]) -> str:
        (name,) = command[command.index("--only") + 1].split(",")
        measured.append(name)
        nonlocal clock
        clock += seconds
        found = gpu_parts.Findings(Path(command[command.index("--into") + 1]) / f"{name}.json")
        found.show(f"{name} {len(measured)}", seconds, "", [goal(f"{name}, ms", 1.0, at_most=2.0)])
        return ""

    head = gpu.report_head("gpu", gpu.PACKAGES) | {"revision": "given"}
    monkeypatch.setattr(gpu, "report_head", lambda *_: dict(head))
    monkeypatch.setattr(gpu, "run_limited", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    file = tmp_path / "gpu-card.json"
    first = gpu.check_gpu(gpu.parse([]), file)
    compiled = first["parts"].pop("compiled")["not_shown"]
    assert len(measured) == len(gpu.PARTS) - 1 and "run --only compiled" in compiled[0]["reason"]
    second = gpu.check_gpu(gpu.parse(["--only", "compiled"]), file)
    assert measured[-1] == "compiled" and list(second["parts"]) == list(gpu.PARTS)
    assert {name: part for name, part in second["parts"].items() if name != "compiled"} == first["parts"]
    assert [item["name"] for item in second["goals"]] == [f"{name}, ms" for name in gpu.PARTS]


def test_the_command_line_has_the_check(monkeypatch: pytest.MonkeyPatch):
    given: list[list[str]] = []
    monkeypatch.setattr(gpu, "main", lambda words: given.append(words) or 0)
    assert cli.main(["bench", "gpu", "--dry", "--only", "answers", "train.tf32=false"]) == 0
    assert given == [["train.tf32=false", "--dry", "--only", "answers"]]
    assert re.search(r"name a run with --run", str(pytest.raises(ValueError, cli.bench, cli.parse(["bench"])).value))
