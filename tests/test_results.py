"""Published figures: every report has one shape, and tables and stored outputs say what the reports say."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from pillsnap.answer.imprint.ranking import RATIOS
from pillsnap.answer.search.imprints import NEVER
from pillsnap.bench import publish
from pillsnap.bench.engines.infer import table
from pillsnap.bench.gallery.drawn import LEVELS

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))
TEXTS = [path for pattern in publish.TEXTS for path in sorted(ROOT.glob(pattern))]
RUN_NOTEBOOKS = [ROOT / "nbs" / f"{name}.ipynb" for name in publish.EXECUTED]


def reports() -> dict[str, dict]:
    """All published reports by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS}


def outputs(notebook: Path) -> list[dict]:
    """All stored outputs of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_results_are_those_of_known_benchmarks() -> None:
    assert {path.stem for path in RESULTS if not path.stem.startswith("gpu-")} == set(publish.REPORTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_have_one_shape(path: Path) -> None:
    report = publish.check_report(path)
    assert report["benchmark"] == path.stem.partition("-")[0]
    assert datetime.fromisoformat(report["date"]).tzinfo and report["machine"]["cores"] > 0 and report["goals"]
    for goal in report["goals"]:
        assert set(goal) in ({"name", "value", "n", "spread", bound} for bound in ("at_least", "at_most")), goal


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_tables_say_what_the_results_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert publish.with_tables(text, reports()) == text, "run `make results`"


def test_every_table_is_shown() -> None:
    marked = [name for path in TEXTS for name in re.findall(r"<!-- table ([\w-]+) -->", path.read_text("utf-8"))]
    assert sorted(marked) == sorted(publish.TABLES)


@pytest.mark.parametrize("name", publish.TABLES)
def test_all_rows_of_a_table_have_as_many_cells_as_its_head(name: str) -> None:
    report, rows_of = publish.TABLES[name]
    rows = rows_of(reports()[report])
    assert len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}


def test_a_changed_figure_is_noticed() -> None:
    changed, text = reports(), (ROOT / "README.md").read_text(encoding="utf-8")
    changed["demo"]["single"]["top1"] -= 0.1
    assert publish.with_tables(text, changed) != text


@pytest.mark.parametrize("path", RUN_NOTEBOOKS, ids=lambda path: path.name)
def test_run_notebooks_show_a_run(path: Path) -> None:
    shown = outputs(path)
    assert {kind for output in shown for kind in output.get("data", {})} & {"image/png", "image/jpeg"}
    assert not [output for output in shown if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


def test_the_benchmark_notebook_shows_the_published_measurement() -> None:
    printed = "".join("".join(output.get("text", "")) for output in outputs(ROOT / "nbs" / "13_benchmark.ipynb"))
    assert table(reports()["infer"]) in printed


def test_readings_weigh_what_was_measured() -> None:
    measured = reports()["gallery"]["values"]["studio"]["ratios"]
    for name, level in [*zip(LEVELS, range(len(LEVELS)), strict=True), ("never", NEVER)]:
        assert np.allclose(RATIOS[:, level], measured[name], rtol=0.05, atol=0.005), f"03_ranking has another {name}"
