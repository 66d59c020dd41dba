"""Catalogue and search from outside: registers as they come, the command, and the service without a model."""

from __future__ import annotations

import io
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tiny_models import CONFIG, KEY, RIGHT

from pillsnap import cli
from pillsnap.answer.search.catalog import Catalog, import_register, read_catalog
from pillsnap.answer.search.registers import MFDS_COLUMNS, read_register
from pillsnap.answer.search.tables import MAX_BYTES
from pillsnap.answer.search.words import SearchError
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.serve import create_app

HEAD = "품목일련번호,품목명,업소명,표시앞,표시뒤,의약품제형,색상앞,색상뒤,분할선앞,분할선뒤,크기장축,제형코드명"
ROWS = (
    "200000001,하나정,예시제약,A1분할선,,원형,하양,,-,,8.1,나정\n"
    '200000002,"둘캡슐, 10mg",예시제약,B2,마크,장방형,"노랑, 투명",초록,,,17.5,경질캡슐제\n'
)
REGISTER = f"{HEAD}\n{ROWS}"


def xlsx(rows: list[list[str]]) -> bytes:
    """An XLSX as office programs write it: shared texts, numbers, empty cells left out."""
    texts = sorted({text for row in rows for text in row if text and not text.isdigit()})
    cells = []
    for number, row in enumerate(rows, 1):
        line = ""
        for column, text in enumerate(row):
            place = f"{chr(65 + column)}{number}"
            if text.isdigit():
                line += f'<c r="{place}"><v>{text}</v></c>'
            elif text:
                line += f'<c r="{place}" t="s"><v>{texts.index(text)}</v></c>'
        cells.append(f'<row r="{number}">{line}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(f'<si><t>{t}</t></si>' for t in texts)}</sst>")
        archive.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{''.join(cells)}</sheetData></worksheet>"
        )
    return packed.getvalue()


def sentence(path: Path, content: bytes | str) -> str:
    """What the import of a file says."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SearchError) as caught:
        read_register(path)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16"])
def test_the_korean_register_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "register.csv").write_bytes(REGISTER.replace("\n", "\r\n").encode(encoding))
    first, second = read_register(tmp_path / "register.csv").records.values()
    assert (first.code, first.name, first.imprints, first.scores) == ("200000001", "하나정", (("A1", None),), ("line",))
    assert second.name == "둘캡슐, 10mg" and second.colors == ("yellow", "transparent", "green")
    assert second.imprints == (("B2", ""),) and second.shapes == ("oblong",) and second.lengths_mm == (17.5,)


def test_the_korean_register_as_xlsx_reads_like_the_csv(tmp_path: Path) -> None:
    (tmp_path / "register.csv").write_text(REGISTER, encoding="utf-8")
    rows = [HEAD.split(","), "200000001,하나정,예시제약,A1분할선,,원형,하양,,-,,8.1,나정".split(",")]
    (tmp_path / "register.xlsx").write_bytes(xlsx(rows))
    (found,) = read_register(tmp_path / "register.xlsx").records.values()
    assert found == next(iter(read_register(tmp_path / "register.csv").records.values()))


@pytest.mark.parametrize("column", [names[0] for names in MFDS_COLUMNS.values()])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    said = sentence(tmp_path / "register.csv", REGISTER.replace(column, "다른것", 1))
    assert f"has no column {column}:" in said


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_half_a_download_changes_nothing(tmp_path: Path, kept: float) -> None:
    file, catalog = tmp_path / "register.csv", tmp_path / "catalog.json"
    file.write_text(REGISTER, encoding="utf-8")
    import_register(file, catalog)
    before = catalog.read_bytes()
    for content in (REGISTER.encode(), xlsx([HEAD.split(","), ["1", "x"]]), b'{"items": [{"id": "1", "zh": "x"}]}'):
        sentence(file, content[: int(len(content) * kept)])
        with pytest.raises(SearchError):
            import_register(file, catalog)
        assert catalog.read_bytes() == before and len(list(tmp_path.glob("[!.]*"))) == 2


def test_a_register_that_ends_at_a_line_takes_the_place_of_no_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, catalog = tmp_path / "register.csv", tmp_path / "catalog.json"
    rows = [
        f"{number},약{number}정,예시제약,A{number},,원형,하양,,-,,8.1,나정" for number in range(200000001, 200000021)
    ]
    file.write_text("\n".join([HEAD, *rows]), encoding="utf-8")
    assert cli.main(["catalog", "import", str(file), "--catalog", str(catalog)]) == 0
    before = catalog.read_bytes()
    file.write_text("\n".join([HEAD, *rows[:12]]), encoding="utf-8")
    assert cli.main(["catalog", "import", str(file), "--catalog", str(catalog)]) == 2
    assert "has 12 drugs, and the edition in the catalogue has 20" in capsys.readouterr().err
    assert catalog.read_bytes() == before
    assert cli.main(["catalog", "import", str(file), "--fewer", "--catalog", str(catalog)]) == 0
    assert len(read_catalog(catalog).records) == 12


def test_a_damaged_model_of_the_service_leaves_the_catalogue_to_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "register.csv").write_text(REGISTER, encoding="utf-8")
    (tmp_path / "classifier.onnx").write_bytes(b"no model")
    monkeypatch.setenv("MODEL_PATH", str(tmp_path))
    import_register(tmp_path / "register.csv", tmp_path / "catalog.json")
    words = ["search", "--imprint", "A1", "--catalog", str(tmp_path / "catalog.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "하나정" in said.out and "The labels of the model are not searched" in said.err + said.out
    assert cli.main([*words, "--model", str(tmp_path)]) == 2, "a model that was named is an error"


def test_two_imports_at_once_lose_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other, path = tmp_path / "register.csv", tmp_path / "tfda.json", tmp_path / "catalog.json"
    file.write_text(REGISTER, encoding="utf-8")
    item = {"id": "9", "zh": "錠", "en": "Tab", "mark1": "S", "mark2": None, "shape": [], "color": [], "score_mark": []}
    other.write_text(json.dumps({"items": [item]}), encoding="utf-8")
    read = read_catalog

    def slowly(place: Path) -> Catalog:
        found = read(place)
        time.sleep(0.3)
        return found

    monkeypatch.setattr("pillsnap.answer.search.catalog.read_catalog", slowly)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(import_register, each, path) for each in (file, other)]:
            done.result()
    assert len(read(path).registers) == 2


def test_files_that_are_no_register(tmp_path: Path) -> None:
    file = tmp_path / "register.csv"
    assert "is empty" in sentence(file, b"\n") and "no row" in sentence(file, HEAD)
    assert "neither" in sentence(file, "name,age\nx,1\n")
    assert "neither UTF-8 nor cp949" in sentence(file, b"\xff\x81\x00\xfe" * 40)
    assert "no JSON" in sentence(file, b"[" * 200_000) and "no list" in sentence(file, b'{"drugs": 3}')
    assert "can't be read" in str(pytest.raises(SearchError, read_register, tmp_path / "none.csv").value)
    assert "can't be read" in str(pytest.raises(SearchError, read_register, tmp_path).value)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", bytes(MAX_BYTES + 1))
    assert "unpacks to more than" in sentence(file, packed.getvalue())
    with file.open("wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    assert "more than a register has" in str(pytest.raises(SearchError, read_register, file).value)


def test_fifty_megabytes_are_read(tmp_path: Path) -> None:
    row = "{},큰 등록정,예시제약,A{},,원형,하양,,-,,8.1,나정" + "," + "x" * 900 + "\n"
    with (tmp_path / "register.csv").open("w", encoding="utf-8") as file:
        file.write(f"{HEAD},성상\n")
        file.writelines(row.format(number, number) for number in range(52_000))
    assert (tmp_path / "register.csv").stat().st_size > 50_000_000
    assert len(read_register(tmp_path / "register.csv").records) == 52_000


def test_the_command_imports_shows_and_searches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no settings and no model
    monkeypatch.delenv("MODEL_PATH", raising=False)
    (tmp_path / "register.csv").write_text(REGISTER.replace("초록", "무지개"), encoding="utf-8")
    catalog = ["--catalog", str(tmp_path / "catalog.json")]
    assert cli.main(["catalog", "import", str(tmp_path / "register.csv"), *catalog]) == 0
    said = capsys.readouterr()
    assert "2 drugs from register.csv" in said.out and "colour 무지개 (1)" in said.err
    assert cli.main(["catalog", "show", *catalog]) == 0 and "2 drugs" in capsys.readouterr().out
    assert cli.main(["search", "--imprint", "a1", "--color", "white", *catalog]) == 0
    said = capsys.readouterr()
    assert "200000001" in said.out and "exact 1" in said.out and "contradict" in said.out
    assert cli.main(["search", "--imprint", "2b", "--json", *catalog]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in answer["groups"] if group["count"]] == ["similar", "partly"]
    assert cli.main(["search", "--color", "navy", *catalog]) == 1
    assert cli.main(["search", *catalog]) == 2 and "nothing to search for" in capsys.readouterr().err
    assert cli.main(["search", "--imprint", "A", "--catalog", str(tmp_path / "none.json")]) == 2
    assert "there is nothing to search" in capsys.readouterr().err
    assert cli.main(["catalog", "import", *catalog]) == 2 and "takes the file" in capsys.readouterr().err
    (tmp_path / "catalog.json").write_text("{}")
    assert cli.main(["search", "--imprint", "A", *catalog]) == 2
    assert "import the registers again" in capsys.readouterr().err


def test_a_service_without_a_model_searches(tmp_path: Path) -> None:
    (tmp_path / "register.csv").write_text(REGISTER, encoding="utf-8")
    settings = load_settings(CONFIG, [f"paths.catalog={tmp_path / 'catalog.json'}", "serve.features=mvp"])
    with TestClient(create_app(settings, Environment((RIGHT,)))) as client:
        assert client.get("/search?imprint=A1").status_code == 401
        assert client.get("/search?imprint=A1", headers=KEY).json()["records"] == 0
        import_register(tmp_path / "register.csv", tmp_path / "catalog.json")
        answer = client.get("/search?imprint=a1&color=하양", headers=KEY).json()
        assert answer["records"] == 2 and answer["groups"][0]["hits"][0]["name"] == "하나정"
        for query in (
            "",
            "?imprint=" + "A" * 10_000,
            "?imprint=A%00B",
            "?imprint=<b>A</b>",
            "?color=colour",
            "?limit=0",
        ):
            response = client.get(f"/search{query}", headers=KEY)
            assert response.status_code == 422 and len(response.json()["detail"].split()) > 3, query
        (tmp_path / "catalog.json").write_text("{")
        response = client.get("/search?imprint=A1", headers=KEY)
        assert response.status_code == 503 and response.json()["code"] == "catalog_unusable"
    assert client.get("/health").status_code == 200


def test_the_labels_of_a_model_are_searched(models: Path, tmp_path: Path) -> None:
    settings = load_settings(CONFIG, [f"paths.catalog={tmp_path / 'catalog.json'}"])
    with TestClient(create_app(settings, Environment((RIGHT,), model_path=models))) as client:
        answer = client.get("/search?shape=oblong", headers=KEY).json()
    hits = [hit["code"] for group in answer["groups"] for hit in group["hits"] if hit["source"] == "labels"]
    assert hits[0] == "K-000007" and len(hits) == 3


def test_an_earlier_edition_is_replaced_and_its_hash_differs(tmp_path: Path) -> None:
    file, catalog = tmp_path / "register.csv", tmp_path / "catalog.json"
    file.write_text(REGISTER, encoding="utf-8")
    first, _ = import_register(file, catalog)
    file.write_text(REGISTER.replace("하나정", "새하나정"), encoding="utf-8")
    second, _ = import_register(file, catalog)
    assert len(second.records) == 2 and second.hash != first.hash and read_catalog(catalog) == second
