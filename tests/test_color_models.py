"""Models of colours: training from all kinds of data, resuming, files, export, gate and command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pillsnap import cli, color
from pillsnap.color.bench import bench_color
from pillsnap.color.data.pairs import PairError
from pillsnap.color.export import bake, export_adaptive
from pillsnap.color.networks import speed
from pillsnap.color.networks.adaptive import AdaptiveLut
from pillsnap.color.networks.files import get_model_info, load_model, save_model
from pillsnap.color.networks.nilut import Nilut, style_weights
from pillsnap.color.networks.statistics import Look, look_distance, look_of
from pillsnap.color.style import changed, run_style_learning
from pillsnap.color.train import train_color
from pillsnap.config.load import load_settings
from pillsnap.config.schema import Settings, SettingsError
from pillsnap.errors import PillsnapError
from pillsnap.registry import model_info
from pillsnap.registry.store import list_versions, open_store
from pillsnap.runs import read_run, run_state
from pillsnap.runtime.color.cube import CubeError, read_cube
from pillsnap.runtime.color.cube_write import write_cube
from pillsnap.runtime.color.lut import Grid, Lut, identity_table
from pillsnap.runtime.color.spaces import delta_e76, to_lab
from pillsnap.training.checkpoint import CheckpointError

TINY = ["color.hidden_dims=[48,48]", "color.batch_colors=1024", "color.image_size=32", "color.lut_size=9"]
SHORT = ["color.epochs=1", "color.min_steps=12", "color.batch_size=4", "train.evaluations=2", "train.log_every=1"]
Make = Callable[..., Settings]


@pytest.fixture
def settings(tmp_path: Path) -> Make:
    """A function that makes settings of a tiny training."""

    def make(*overrides: str, data: Path | None = None) -> Settings:
        merged = [*TINY, *SHORT, f"paths.run_root={tmp_path / 'runs'}", *overrides]
        latest = {text.partition("=")[0]: text for text in merged}
        return load_settings(profile="cpu", overrides=list(latest.values()), data_root=data)

    return make


@pytest.fixture
def cubes(tmp_path: Path) -> Path:
    """Three LUTs."""
    folder = tmp_path / "luts"
    gains = {"warm": (1.0, 0.9, 0.7), "cool": (0.8, 0.95, 1.0), "dark": (0.7, 0.7, 0.7)}
    for name, values in gains.items():
        write_cube(Lut(grid=Grid(identity_table(9) * values)), folder / f"{name}.cube")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Cut-out photos of pills."""
    folder, rng = tmp_path / "studio", np.random.default_rng(0)
    folder.mkdir()
    for number in range(10):
        photo = np.zeros((48, 64, 3), np.uint8)
        cv2.ellipse(photo, (32, 24), (20, 12), 0, 0, 360, rng.integers(60, 250, 3).tolist(), -1, cv2.LINE_AA)
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Photos before and after: without green light, and half as blue."""
    root, rng = tmp_path / "pairs", np.random.default_rng(0)
    for number in range(10):
        photo = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        after = (photo * [1.0, 0.8, 0.5]).round().astype(np.uint8)
        for folder, pixels in (("raw", photo), ("processed", after)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


# Training


def test_a_nilut_learns_luts(settings: Make, cubes: Path, tmp_path: Path):
    chosen = settings("color.data_type=cube", f"color.cube_dir={cubes}", "color.min_steps=300", "color.lr=0.003")
    folder = train_color(chosen, tmp_path / "runs" / "color" / "first")
    record = read_run(folder)
    assert run_state(record) == "finished" and not record.problems
    rows = [row for row in record.rows if row["task"] == "nilut"]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 301))
    checks = [row["validation"] for row in rows if "validation" in row]
    assert len(checks) == 2 and checks[-1]["de76"] < 3
    assert any((folder / "tensorboard").iterdir())
    network = load_model(folder / "best.pt")
    colors = np.random.default_rng(0).random((500, 3))
    for style in ("warm", "cool", "dark"):
        expected = to_lab(read_cube(cubes / f"{style}.cube")(colors))
        assert delta_e76(to_lab(bake(network, style)(colors)), expected).mean() < 3
    blended = to_lab(bake(network, {"warm": 0.5, "cool": 0.5})(colors))
    luts = [read_cube(cubes / f"{style}.cube")(colors) for style in ("warm", "cool")]
    assert delta_e76(blended, to_lab((luts[0] + luts[1]) / 2)).mean() < 3


@pytest.mark.parametrize("model", ["nilut", "adaptive_3dlut"])
def test_both_models_learn_from_pairs(model: str, settings: Make, pairs: Path, tmp_path: Path):
    steps = ["color.min_steps=150", "color.lr=0.005"]
    folder = train_color(settings(f"color.model={model}", *steps, data=pairs), tmp_path / "run")
    checks = [row["validation"] for row in read_run(folder).rows if "validation" in row]
    assert checks[-1]["de76"] < checks[-1]["de76_before"] / 2
    assert get_model_info(folder / "best.pt")["model_type"] == model


def test_an_adaptive_lut_learns_to_remove_the_light(settings: Make, photos: Path, tmp_path: Path):
    phone = ["color.model=adaptive_3dlut", "color.data_type=phone", "color.min_steps=150", "color.lr=0.005"]
    folder = train_color(settings(*phone, data=photos), tmp_path / "run")
    checks = [row["validation"] for row in read_run(folder).rows if "validation" in row]
    assert checks[-1]["de76"] < 0.8 * checks[-1]["de76_before"]


def test_a_resumed_run_comes_to_the_same_weights(settings: Make, pairs: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_color(settings(data=pairs), whole)

    class Ended(Exception):
        pass

    def end(folder: Path) -> None:
        raise Ended

    with pytest.raises(Ended):
        train_color(settings(data=pairs), parts, end)
    assert get_model_info(parts / "last.pt")["param_count"] > 0
    train_color(settings("train.resume=last", data=pairs), parts)
    first, second = (load_model(folder / "last.pt").state_dict() for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[row["loss"] for row in read_run(folder).rows if "loss" in row] for folder in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(settings: Make, pairs: Path, tmp_path: Path):
    train_color(settings(data=pairs), tmp_path / "run")
    with pytest.raises(CheckpointError, match="already holds a run"):
        train_color(settings(data=pairs), tmp_path / "run")
    with pytest.raises(CheckpointError, match="lr was 0.001, now 0.5"):
        train_color(settings("train.resume=last", "color.lr=0.5", data=pairs), tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of such a model"):
        adaptive = settings("train.resume=last", "color.model=adaptive_3dlut", data=pairs)
        train_color(adaptive, tmp_path / "run")


def changed_cube(cubes: Path) -> None:
    write_cube(Lut(grid=Grid(identity_table(9) * 0.5)), cubes / "warm.cube")


def new_cube(cubes: Path) -> None:
    write_cube(Lut(grid=Grid(identity_table(9) * 0.5)), cubes / "night.cube")


@pytest.mark.parametrize("change", [changed_cube, new_cube])
def test_a_run_is_not_resumed_with_other_luts(
    change: Callable[[Path], None], settings: Make, cubes: Path, tmp_path: Path
):
    given = ["color.data_type=cube", f"color.cube_dir={cubes}"]
    folder = train_color(settings(*given), tmp_path / "run")
    train_color(settings(*given, "train.resume=last"), folder)
    change(cubes)
    with pytest.raises(CheckpointError, match="photos or LUTs that the run of .*last.pt began with have changed"):
        train_color(settings(*given, "train.resume=last"), folder)


@pytest.mark.parametrize(
    "given", [[], ["color.model=adaptive_3dlut"], ["color.model=adaptive_3dlut", "color.data_type=phone"]]
)
def test_a_run_is_not_resumed_with_other_photos(given: list[str], settings: Make, pairs: Path, tmp_path: Path):
    folder = train_color(settings(*given, data=pairs), tmp_path / "run")
    train_color(settings(*given, "train.resume=last", data=pairs), folder)
    Image.new("RGB", (64, 48), "red").save(pairs / "processed" / "3.png")
    with pytest.raises(CheckpointError, match="photos or LUTs that the run of .*last.pt began with have changed"):
        train_color(settings(*given, "train.resume=last", data=pairs), folder)


def test_all_photos_without_a_partner_are_listed(settings: Make, pairs: Path, tmp_path: Path):
    for number in range(25):
        Image.new("RGB", (64, 48), "red").save(pairs / "raw" / f"alone{number}.png")
    folder = train_color(settings(data=pairs), tmp_path / "run")
    listed = (folder / "left_out.txt").read_text().splitlines()
    assert len(listed) == 25
    assert all(any(f"alone{number}.png has no partner" in line for line in listed) for number in range(25))
    assert f"all 25 files are listed in {folder / 'left_out.txt'}" in (folder / "run.log").read_text()


# Bad input


def test_data_that_cannot_be_used_is_refused_with_a_sentence(settings: Make, pairs: Path, cubes: Path, tmp_path: Path):
    (cubes / "large.cube").write_text("LUT_3D_SIZE 300\n")
    with pytest.raises(CubeError, match="LUT_3D_SIZE is 300"):
        train_color(settings("color.data_type=cube", f"color.cube_dir={cubes}"), tmp_path / "a")
    with pytest.raises(SettingsError, match="--data-root"):
        train_color(settings(), tmp_path / "b")
    with pytest.raises(SettingsError, match="--cube-dir"):
        train_color(settings("color.data_type=cube"), tmp_path / "c")
    with pytest.raises(SettingsError, match="can't learn from color.data_type=phone"):
        train_color(settings("color.data_type=phone", data=pairs), tmp_path / "d")
    with pytest.raises(PairError, match="raw/ and processed/"):
        train_color(settings(data=cubes), tmp_path / "e")
    Image.new("RGB", (30, 30), "red").save(pairs / "raw" / "0.png")
    (pairs / "processed" / "1.png").unlink()
    folder = train_color(settings(data=pairs), tmp_path / "f")
    log = (folder / "run.log").read_text()
    assert "30 x 30 pixels" in log and "1.png has no partner" in log
    assert any(item["what"] == "files left out" and item["choice"] == "2" for item in read_run(folder).decisions)


# Files, export, gate


def test_three_styles_take_no_more_than_540_kilobytes(tmp_path: Path):
    save_model(Nilut(["a", "b", "c"]), tmp_path / "nilut.pt")
    assert (tmp_path / "nilut.pt").stat().st_size <= 540_000
    info = get_model_info(tmp_path / "nilut.pt")
    assert set(info) == {"model_type", "model_config", "file_size_bytes", "param_count"}
    assert model_info.get_model_info(tmp_path / "nilut.pt")["model_type"] == "nilut"


FOREIGN = {
    "a tensor": torch.zeros(3),
    "a list": [1, 2],
    "weights of something else": {"layer.weight": torch.zeros(3)},
    "another type": {"model_type": "resnet"},
    "a type that is no name": {"model_type": ["nilut"]},
    "no configuration": {"model_type": "nilut", "state": {}},
    "no weights": {"model_type": "nilut", "model_config": {"styles": ["a"], "hidden_dims": [8]}},
    "weights of another size": {
        "model_type": "adaptive_3dlut",
        "model_config": {"n_basis": 1, "lut_size": 5, "image_size": 16},
        "state": {"basis": torch.zeros(2)},
    },
    "weights that are none": {"model_type": "adaptive_3dlut", "model_config": {}, "state": [1]},
    "a configuration that is none": {"model_type": "nilut", "model_config": 7, "state": {}},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_or_damaged_file_is_one_sentence(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(content, tmp_path / "file.pt")
    for describe in (get_model_info, model_info.get_model_info):
        with pytest.raises(PillsnapError, match="file.pt"):
            describe(tmp_path / "file.pt")
    assert run("color", "info", "--model", str(tmp_path / "file.pt")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_baked_nilut_is_the_network(tmp_path: Path):
    torch.manual_seed(0)
    network = Nilut(["a", "b"]).eval()
    for parameter in network.parameters():
        parameter.data *= 1.5
    colors = torch.rand(5000, 3)
    with torch.inference_mode():
        expected = network(colors, style_weights(network, {"a": 0.4, "b": 0.6}))
    baked = bake(network, {"a": 0.4, "b": 0.6})(colors.double().numpy())
    assert delta_e76(to_lab(baked), to_lab(expected.numpy())).mean() <= 0.5


def test_the_onnx_file_gives_the_colours_of_the_model(tmp_path: Path):
    torch.manual_seed(0)
    network = AdaptiveLut(n_basis=3, lut_size=33, image_size=64)
    torch.nn.init.normal_(network.basis, std=0.1)
    save_model(network, tmp_path / "best.pt")
    assert export_adaptive(tmp_path / "best.pt", tmp_path / "best.onnx") <= 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "best.onnx"), providers=["CPUExecutionProvider"])
    photo = torch.rand(1, 3, 270, 480)
    with torch.inference_mode():
        expected = network.eval()(photo).numpy()
    assert np.abs(session.run(None, {"photos": photo.numpy()})[0] - expected).max() <= 1e-4


def test_every_device_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(f"cuda {device.index}"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        speed.wait_for(torch.device(name))
    assert waited == ["cuda 1", "mps"]
    monkeypatch.setattr(speed, "wait_for", lambda device: waited.append(device.type))
    speed.time_model(AdaptiveLut(lut_size=5, image_size=16).eval(), (8, 8), iterations=2, warmup=1)
    assert waited[2:] == ["cpu"] * 4, "before the first run, and after each"


def test_the_gate_names_the_limit_that_is_missed(settings: Make, tmp_path: Path):
    save_model(Nilut(["a"]), tmp_path / "nilut.pt")
    report, _ = bench_color(tmp_path / "nilut.pt", settings("gate.nilut_mb=0.1"), [(32, 32)], 1, out=tmp_path)
    assert not report["passed"] and "gate.nilut_mb" in report["failures"][0]


def test_photos_that_are_canonical_already_have_to_stay(settings: Make, photos: Path, tmp_path: Path):
    """A NILUT under its style identity, and a phone model that has learned nothing yet, with and without --photos."""
    torch.manual_seed(0)
    changing = AdaptiveLut(lut_size=5, image_size=16)
    save_model(Nilut(["a"]), tmp_path / "nilut.pt", {"data_type": "cube"})
    save_model(AdaptiveLut(lut_size=5, image_size=16), tmp_path / "phone.pt", {"data_type": "phone"})
    torch.nn.init.constant_(changing.basis, 5.0)
    save_model(changing, tmp_path / "changing.pt", {"data_type": "phone"})
    for name, passes in (("nilut", True), ("phone", True), ("changing", False)):
        for folder in (None, photos):
            report, _ = bench_color(tmp_path / f"{name}.pt", settings(), [(8, 8)], 1, folder, tmp_path / "reports")
            (check,) = [item for item in report["checks"] if "canonical photos" in item["name"]]
            assert check["figure"] is not None and (check["figure"] <= 1) == passes == report["passed"]
            assert ("of the sample" in check["name"]) == (folder is None)
    report, _ = bench_color(tmp_path / "phone.pt", settings(), [(8, 8)], 1, tmp_path / "none", tmp_path / "reports")
    assert "there is no folder" in report["failures"][0] and "--photos" in report["failures"][0]


# Command


def run(*words: str) -> int:
    return cli.main([*words, "--profile", "cpu"])


def test_the_command_from_training_to_the_store(
    cubes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pillsnap.commands.color.find_root", lambda: tmp_path)
    folder, model = tmp_path / "run", tmp_path / "run" / "best.pt"
    train = ["color", "train", "--data-type", "cube", "--cube-dir", str(cubes), "--run-dir", str(folder)]
    assert run(*train, *TINY, *SHORT, f"paths.run_root={tmp_path}") == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert run("color", "info", "--model", str(model)) == 0
    assert json.loads(capsys.readouterr().out)["model_config"]["styles"] == ["cool", "dark", "warm"]
    assert run("color", "bake", "--model", str(model), "--style", "warm", "--size", "17", "--out", str(tmp_path)) == 0
    assert read_cube(tmp_path / "exports" / "warm_17.cube").title == "warm"
    bench = ["color", "bench", "--model", str(model), "--resolutions", "64x48", "32x32", "--iterations", "2"]
    assert run(*bench, "--out", str(tmp_path / "reports")) == 0
    (report,) = (tmp_path / "reports").glob("benchmark_*.json")
    assert list(json.loads(report.read_text())["times"]) == ["64x48", "32x32"]
    assert run(*bench, "--out", str(tmp_path / "reports"), "gate.nilut_mb=0.001") == 1
    assert "size is" in capsys.readouterr().err
    assert run("color", "push", "--run-dir", str(folder), "--size", "5", f"store.url={tmp_path / 'store'}") == 0
    versions = list_versions(open_store(tmp_path / "store"), "nilut")
    assert [sorted(version.files) for version in versions] == [["best.pt", "config.yaml", "last.pt"]]
    assert sorted(path.name for path in (tmp_path / "store" / "models" / "exports").iterdir()) == [
        "cool_5.cube",
        "dark_5.cube",
        "warm_5.cube",
    ]


def test_the_command_learns_a_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    slope = np.linspace(20, 230, 64)[None, :, None].repeat(48, axis=0) * [1.0, 0.8, 0.6]
    Image.fromarray(slope.astype(np.uint8)).save(tmp_path / "look.png")
    learn = ["color", "learn", "--references", str(tmp_path / "look.png"), "--out", str(tmp_path / "look.pt")]
    assert run(*learn, "color.epochs=2", "color.hidden_dims=[8]") == 0
    assert json.loads(capsys.readouterr().out)["references"] == 1
    assert get_model_info(tmp_path / "look.pt")["model_config"]["styles"] == ["look"]
    Image.new("L", (40, 40)).save(tmp_path / "grey.png")
    assert run("color", "learn", "--references", str(tmp_path / "grey.png"), "--out", str(tmp_path / "no.pt")) == 2
    assert "one plain colour" in capsys.readouterr().err and not (tmp_path / "no.pt").exists()


def drawn_photo(seed: int, gains: tuple[float, ...], lift: float) -> np.ndarray:
    """Soft patches of colours in a light."""
    rng = np.random.default_rng(seed)
    patches = cv2.resize(rng.uniform(0.1, 0.9, (5, 5, 3)).astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
    grey = patches.mean(axis=2, keepdims=True)
    return (255 * np.clip((grey + 0.6 * (patches - grey)) * gains + lift, 0, 1)).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["nilut", "adaptive_3dlut"])
def test_a_look_is_given_to_photos_that_were_never_seen(kind: str, tmp_path: Path):
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(drawn_photo(number, (0.8, 0.6, 0.4), 0.12)).save(path)
    small = {"epochs": 30, "lr": 3e-3, "lut_size": 9, "image_size": 32, "hidden_dims": (32, 32)}
    seen: list[int] = []
    result = run_style_learning(paths, tmp_path / "look.pt", kind, small, lambda done, total: seen.append(total))
    assert result["references"] == 5 and result["held_out"] == 1 and seen[-1] == 240
    assert result["distance_after"] <= result["distance_before"] / 2, "of what was held out"

    def look(photos: torch.Tensor) -> Look:
        return look_of(photos.movedim(1, -1).reshape(-1, 3))

    def tensor(*pictures: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255

    wanted = look(tensor(*(np.asarray(Image.open(path)) for path in paths)))
    unseen = tensor(*(drawn_photo(100 + number, (1.0, 1.0, 1.0), 0.0) for number in range(6)))
    with torch.inference_mode():
        toned = changed(load_model(tmp_path / "look.pt", kind), unseen)
        before, after = (float(look_distance(look(photos), wanted)) for photos in (unseen, toned))
    assert before > 10 and after <= before / 2


@pytest.mark.parametrize("references, held", [(1, []), (2, [1]), (10, [2])])
def test_references_that_are_held_out_are_not_trained_on(
    references: int, held: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [tmp_path / f"{number}.png" for number in range(references)]
    for number, path in enumerate(paths):
        Image.fromarray(drawn_photo(number, (0.8, 0.6, 0.4), 0.12)).save(path)
    used: list[torch.Tensor] = []
    monkeypatch.setattr("pillsnap.color.style.recolored", lambda photos, generator: used.append(photos) or photos)
    config = {"epochs": 4, "lut_size": 5, "image_size": 16}
    result = run_style_learning(paths, tmp_path / "look.pt", config=config)
    assert result["held_out"] == sum(held)
    trained, measured = (set(map(bytes, torch.cat(part).numpy())) for part in (used[:-1], used[-1:]))
    assert len(measured) == max(1, sum(held)) and len(trained) == max(1, references - sum(held))
    assert bool(trained & measured) == (references == 1)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["bake"], "color bake needs --model"),
        (["bake", "--model", "{}"], "no style 'film'"),
        (["export", "--model", "{}"], "needs one of type adaptive_3dlut"),
        (["bench", "--model", "{}", "--resolutions", "big"], "'big' is no resolution"),
        (["bench", "--model", "{}", "--iterations", "0"], "--iterations is 0"),
        (["train", "--cube-dir", "nowhere", "--data-type", "cube"], "no .cube file in"),
        (["info", "--model", "nowhere.pt"], "There is no checkpoint nowhere.pt"),
    ],
)
def test_wrong_words_end_with_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_model(Nilut(["warm"], (8,)), tmp_path / "nilut.pt")
    given = [word.format(tmp_path / "nilut.pt") for word in words]
    more = ["--run-dir", str(tmp_path / "run")] if words[0] == "train" else ["--style", "film"]
    assert run("color", *given, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pillsnap: ") and sentence in error


# Names


def test_the_names_of_the_guide_lie_in_one_module():
    for name in color.__all__:
        assert callable(getattr(color, name)) and name in dir(color)
    assert color.NILUT is Nilut and color.get_model_info is get_model_info
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        color.Nothing  # noqa: B018


def test_torch_is_loaded_with_the_first_name():
    code = (
        "import sys, pillsnap.color as color; print('torch' in sys.modules);"
        "from pillsnap.color import ImagePairDataset, CubeDataset, NILUT, run_style_learning, get_model_info;"
        "print('torch' in sys.modules, NILUT.__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == "False\nTrue pillsnap.color.networks.nilut\n"


def test_serving_needs_no_torch():
    code = (
        "import sys, pillsnap.runtime.color.apply, pillsnap.runtime.color.cube_write; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
