"""The run notebooks as a user starts them: papermill, from another folder, with parameters right and wrong."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from papermill import inspect_notebook

from pillsnap.answer.factory import load_identifier

ROOT = Path(__file__).parents[1]
LATER = ["14_color.ipynb", "15_register.ipynb", "16_infer.ipynb", "17_registry_story.ipynb"]


def papermill(folder: Path, notebook: str, *arguments: str) -> subprocess.CompletedProcess:
    """`papermill nbs/<notebook> out.ipynb ...`, started in `folder`."""
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / notebook), str(folder / "out.ipynb"), *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)


def test_train_evaluate_and_export_run_one_after_the_other(tiny_data: Path, tmp_path: Path):
    place = [f"tracking.url=sqlite:///{tmp_path / 'mlflow.db'}", f"paths.cache_root={tmp_path / 'cache'}"]
    place += [f"store.url={tmp_path / 'store'}", "goals.top1=0", "goals.map50=0"]
    overrides = shlex.join([*TINY, *place])
    trained = papermill(
        tmp_path,
        "10_train.ipynb",
        "-p",
        "stage",
        "1",
        "-p",
        "data_root",
        str(tiny_data),
        "-p",
        "profile",
        "cpu",
        "-p",
        "run_dir",
        str(tmp_path / "run"),
        "-p",
        "overrides",
        overrides,
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "classifier step" in trained.stderr and "detector step" in trained.stderr, "the terminal shows the steps"
    book = json.loads((tmp_path / "out.ipynb").read_text())
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    lines = [line for output in outputs for line in "".join(output.get("text", [])).splitlines()]
    assert not [line for line in lines if "INFO" in line], "the log is in the run folder, not in the notebook"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4, (
        "the curves during the training, and three plots at the end"
    )
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 1, "a training batch"
    advice = tmp_path / "run" / "reports" / "stage_1_evaluation.json"
    assert json.loads(advice.read_text())["measured_on"] == "validation"
    evaluated = papermill(tmp_path, "11_evaluate.ipynb", "-p", "run_dir", str(tmp_path / "run"))
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["single"]["images"] > 0
    assert json.loads(advice.read_text())["measured_on"] == "test"
    exported = papermill(tmp_path, "12_export.ipynb", "-p", "run_dir", str(tmp_path / "run"))
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert len(load_identifier(tmp_path / "run" / "export").rules.class_map) == 3
    refused = papermill(
        tmp_path, "15_register.ipynb", "-p", "run_dir", str(tmp_path / "run"), "-p", "overrides", "goals.top1=1"
    )
    assert refused.returncode != 0 and "Not registered: test/single/top1 is" in refused.stderr, refused.stderr[-2000:]
    for task in ("classifier", "detector"):
        given = {"run_dir": str(tmp_path / "run"), "task": task}
        registered = papermill(
            tmp_path, "15_register.ipynb", *(word for item in given.items() for word in ("-p", *item))
        )
        assert registered.returncode == 0, registered.stderr[-2000:]
    photo = next((tiny_data / "train" / "images" / "combination").rglob("K-*_200.png"))
    given = {"photos": shlex.quote(str(photo)), "pipeline": "combo", "overrides": shlex.join(place)}
    answered = papermill(tmp_path, "16_infer.ipynb", *(word for item in given.items() for word in ("-p", *item)))
    assert answered.returncode == 0, answered.stderr[-2000:]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["-p", "stgae", "1"], "stgae is not a parameter of this notebook"),
        (["-p", "stage", "9"], "stage"),
        (["-p", "data_root", "/nowhere/pills"], "There is no folder /nowhere/pills"),
        (["-p", "overrides", "train.lrr=1"], "train.lr"),
        (["-y", "{overrides: [seed=7, train.lrr=1]}"], "did you mean train.lr"),
        (["-p", "overrides", "[seed=7, train.lrr=1]"], "did you mean train.lr"),
        (["-y", "{overrides: {train.lr: 1}}"], "overrides is {'train.lr': 1}, but must be a list of texts"),
        (["-y", "{data_root: [/data]}"], "data_root is ['/data'], but must be text"),
    ],
)
def test_wrong_parameters_train_nothing_and_raise_the_reason(arguments: list[str], sentence: str, tmp_path: Path):
    result = papermill(tmp_path, "10_train.ipynb", "-p", "run_dir", str(tmp_path / "run"), *arguments)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert not (tmp_path / "run" / "last.pt").exists()


def test_evaluating_a_folder_without_a_model_raises_the_reason(tmp_path: Path):
    result = papermill(tmp_path, "11_evaluate.ipynb", "-p", "run_dir", str(tmp_path))
    assert result.returncode != 0
    assert "SettingsError" in result.stderr and "config.yaml" in result.stderr


def test_the_story_of_the_registry_is_stored_with_what_it_shows():
    book = json.loads((ROOT / "nbs" / "17_registry_story.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    text = json.dumps([output.get("text") or output["data"].get("text/plain", "") for output in outputs])
    assert "not registered: test/single/top1 is" in text and "champion" in text and "lakefs://pills-" in text
    assert re.search(r"the same answers for (\d+) of \1 photos", text) and "pillsnap-detector" in text
    assert "can't be opened" in text, "a commit that is not there"
    assert not re.search(r"/(tmp|work|root|home)/", text) and not [one for one in outputs if "ename" in one]


@pytest.mark.parametrize("notebook", ["10_train.ipynb", "11_evaluate.ipynb", "12_export.ipynb", *LATER])
def test_papermill_understands_every_parameter(notebook: str):
    """papermill skips a parameter line with a second `=` in it, and then warns about an unknown parameter."""
    found = {
        parameter["name"]: parameter["help"] for parameter in inspect_notebook(str(ROOT / "nbs" / notebook)).values()
    }
    book = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))
    cell = next(cell for cell in book["cells"] if "parameters" in cell["metadata"].get("tags", []))
    assert len(found) == len([line for line in "".join(cell["source"]).splitlines() if line.strip()])
    assert all(found.values())


def test_a_model_of_colours_is_trained(tmp_path: Path):
    (tmp_path / "luts").mkdir()
    rows = [f"{red} {green} {blue / 2}" for blue in (0, 1) for green in (0, 1) for red in (0, 1)]
    (tmp_path / "luts" / "warm.cube").write_text("LUT_3D_SIZE 2\n" + "\n".join(rows))
    overrides = ["color.hidden_dims=[16]", "color.batch_colors=4096", "color.epochs=2", "train.evaluations=2"]
    given = {"data_type": "cube", "cube_dir": str(tmp_path / "luts"), "profile": "cpu"}
    given |= {"run_dir": str(tmp_path / "run"), "overrides": shlex.join(overrides)}
    result = papermill(tmp_path, "14_color.ipynb", *(word for item in given.items() for word in ("-p", *item)))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "nilut step" in result.stderr and (tmp_path / "run" / "best.pt").is_file()
    book = json.loads((tmp_path / "out.ipynb").read_text())
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
