"""Settings: the rank of their sources, and one sentence for every mistake."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from pillsnap.cli import main
from pillsnap.config import load as config
from pillsnap.config.environment import VARIABLES, check_parameters, load_environment
from pillsnap.config.load import load_settings, save_settings
from pillsnap.config.schema import LEAF_KEYS, Serve, Settings, SettingsError

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config.yaml"
TASKS = ("classifier", "detector")

find_gpu = config.find_gpu  # the fixture below replaces it


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(config, "find_gpu", lambda: None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def sentence(*overrides: str, **arguments) -> str:
    """The message of the SettingsError that these settings raise; always one line."""
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments.pop("path", CONFIG), overrides, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain(settings: Settings) -> dict:
    return settings.model_dump(exclude={"paths": True, "jobs": {"folder"}})


BLOCKS = """
seed: 1
goals: {top1: 0.1, map50: 0.1, latency_ms_p95: 10}
profiles:
  cpu: {seed: 2, goals.top1: 0.2, goals.map50: 0.2}
stages:
  1:
  2: {seed: 3, goals: {top1: 0.3}}
"""


def test_later_sources_win(tmp_path):
    settings = load_settings(write(tmp_path, BLOCKS), ["seed=4"], stage=2)
    assert (settings.goals.latency_ms_p95, settings.goals.map50, settings.goals.top1, settings.seed) == (
        10,
        0.2,
        0.3,
        4,
    )
    assert settings.data.class_images == 80 and settings.stage == 2


def test_environment_has_the_lowest_rank(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("LOG_LEVEL=ERROR\nMODEL_PATH=models\nAPI_KEY=from-file\n", encoding="utf-8")
    monkeypatch.setenv("API_KEY", "from-process")
    environment = load_environment(tmp_path, load_settings(CONFIG, ["serve.log_level=DEBUG"]).serve)
    assert (environment.log_level, environment.model_path, environment.api_keys) == (
        "DEBUG",
        tmp_path / "models",
        ("from-process",),
    )
    assert load_environment(tmp_path).log_level == "ERROR"
    assert "from-process" not in repr(environment)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp949"])
def test_an_env_file_in_another_encoding_is_refused_in_one_sentence(tmp_path, encoding):
    (tmp_path / ".env").write_text("# 열쇠\nAPI_KEY=hush-hush-hush-hush\n", encoding=encoding)
    with pytest.raises(SettingsError, match="is not UTF-8: save it as UTF-8") as caught:
        load_environment(tmp_path)
    assert str(tmp_path / ".env") in str(caught.value) and "hush" not in str(caught.value)


def test_an_env_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / ".env").write_text("API_KEY=from-file\r\nLOG_LEVEL=ERROR\r\n", encoding="utf-8-sig")
    environment = load_environment(tmp_path)
    assert (environment.api_keys, environment.log_level) == (("from-file",), "ERROR")


@pytest.mark.parametrize("line", ["API_KEY: from-file", "API KEY=from-file", "API_KEY='from-file"])
def test_an_env_line_that_cannot_be_read_is_refused(tmp_path, line):
    (tmp_path / ".env").write_text(f"LOG_LEVEL=INFO\n{line}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="line 2 .*NAME=value") as caught:
        load_environment(tmp_path)
    assert "from-file" not in str(caught.value)


def test_an_env_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        load_environment(tmp_path)


@pytest.mark.parametrize("mark", ['"', "'"])
def test_quotes_around_a_value_of_the_environment_are_removed(tmp_path, monkeypatch, mark):
    """`docker --env-file` keeps them."""
    for name, value in {
        "API_KEY": "first, second",
        "ADMIN_KEY": "third",
        "ALLOW_WEAK_KEYS": "1",
        "LOG_LEVEL": "error",
        "LOG_FILE": "/tmp/a b.log",
        "LOG_FORMAT": "json",
        "CORS_ALLOW_ORIGINS": "https://example.org",
        "MODEL_PATH": "/models",
    }.items():
        monkeypatch.setenv(name, f"{mark}{value}{mark}")
    environment = load_environment(tmp_path)
    assert (environment.api_keys, environment.admin_keys) == (("first", "second"), ("third",))
    assert (environment.allow_weak_keys, environment.log_level, environment.log_format) == (True, "ERROR", "json")
    assert (environment.log_file, environment.model_path) == (Path("/tmp/a b.log"), Path("/models"))
    assert environment.cors_allow_origins == ["https://example.org"]
    monkeypatch.setenv("API_KEY", f"{mark}first{mark}, {mark}second{mark}")
    assert load_environment(tmp_path).api_keys == ("first", "second")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "pillsnap.co.kr",
        "https://",
        "https://a.kr/page",
        "https://a.kr:port",
        "https://a.kr https://b.kr",
        "https://u@a.kr",
        "https://a.kr?x",
        "https://*.a.kr",
        '["https://a.kr"',
        "[1]",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setenv("CORS_ALLOW_ORIGINS", text)
    with pytest.raises(SettingsError, match="CORS_ALLOW_ORIGINS is .*https://pillsnap.co.kr"):
        load_environment(tmp_path)
    monkeypatch.delenv("CORS_ALLOW_ORIGINS")
    if not text.startswith("["):
        with pytest.raises(SettingsError, match="serve.cors_allow_origins is .*https://pillsnap.co.kr"):
            load_environment(tmp_path, Serve(cors_allow_origins=(text,)))


def test_origins_are_written_as_browsers_send_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CORS_ALLOW_ORIGINS", "HTTPS://Pillsnap.co.kr:443/, http://[::1]:3000,capacitor://localhost,*")
    assert load_environment(tmp_path).cors_allow_origins == [
        "https://pillsnap.co.kr",
        "http://[::1]:3000",
        "capacitor://localhost",
        "*",
    ]


def test_references_are_resolved_after_merging():
    settings = load_settings(
        CONFIG, ["train.batch_size=128", "dataloader.num_workers=12", "train.detector.lr=3e-4"], profile="cpu"
    )
    assert [getattr(settings.train, task).batch_size for task in TASKS] == [128, 128]
    assert (settings.train.classifier.lr, settings.train.detector.lr, settings.dataloader.num_workers) == (
        1e-3,
        3e-4,
        12,
    )


def test_general_key_on_the_command_line_wins_over_a_profile():
    assert [
        (
            getattr(load_settings(CONFIG, profile="rtx5080").train, task).batch_size,
            getattr(load_settings(CONFIG, profile="rtx5080").train, task).batch_max,
        )
        for task in TASKS
    ] == [("auto", 64), ("auto", 16)]
    settings = load_settings(CONFIG, ["train.batch_size=128", "train.detector.batch_size=4"], profile="rtx5080")
    assert [getattr(settings.train, task).batch_size for task in TASKS] == [128, 4]


def test_defaults_in_code_and_file_agree(tmp_path):
    tree = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    short = write(tmp_path, "seed: 42\n")
    for section in ("profiles", "stages"):
        del tree[section]
    full = tmp_path / "full.yaml"
    full.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert plain(load_settings(full)) == plain(load_settings(short)) == plain(Settings()) | {"profile": "cpu"}


@pytest.mark.parametrize("profile", ["cpu", "rtx5080", "h200"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_all_blocks_load_and_survive_saving(tmp_path, profile, stage):
    settings = load_settings(CONFIG, profile=profile, stage=stage)
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml").model_dump() == settings.model_dump()
    assert "merged already" in sentence(path=tmp_path / "config.yaml", stage=stage % 4 + 1)


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(
        CONFIG, ["paths.cache_root=here", "paths.run_root=${paths.cache_root}/runs"], data_root="pills"
    )
    assert settings.paths.sample_root == ROOT / "data/sample"
    assert settings.paths.data_root == tmp_path / "pills" and settings.paths.run_root == tmp_path / "here/runs"
    assert load_settings(CONFIG, ["paths.data_root=null"]).paths.data_root is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.bach_size=8", ["train.bach_size", "command line", "did you mean train.batch_size?"]),
        ("num_workers=8", ["num_workers", "did you mean dataloader.num_workers?"]),
        ("profile_reason=x", ["profile_reason", "not a setting"]),
        ("train.batch_size=many", ["train.batch_size", "'many'", "number of images from 1 on, or auto"]),
        ("train.batch_size=1.5", ["train.batch_size", "1.5", "number of images from 1 on, or auto"]),
        ("train.batch_size=0", ["train.batch_size", "number of images from 1 on"]),
        ("train.lr=fast", ["train.lr", "'fast'", "valid number"]),
        ("train.lr=.nan", ["train.lr", "finite number"]),
        ("train.tf32=yes", ["train.tf32", "'yes'", "valid boolean"]),
        ("seed=true", ["seed", "True", "valid integer"]),
        ("train.amp=fp8", ["train.amp", "'fp8'", "'bf16'", "'off'"]),
        ("paths.run_root=5", None),
        ("paths.run_root=null", ["paths.run_root", "None", "path"]),
        ("train=5", ["train", "section"]),
        ("train.lr", ["train.lr", "key=value"]),
        ("train.interleave_ratio=[0,0]", ["train.interleave_ratio", "[0, 0]", "train.only"]),
        ("train.interleave_ratio=[-1,2]", ["train.interleave_ratio", "from 1 on"]),
        ("train.interleave_ratio=[1]", ["train.interleave_ratio", "[1]", "required"]),
        ("train.interleave_ratio=[1.5,1]", ["train.interleave_ratio", "1.5", "valid integer"]),
        ("model.detector.image_size=500", ["model.detector.image_size", "500", "multiple of 32"]),
        ("model.classifier.embedding_size=256", ["model.classifier.embedding_size", "256", "at most 131: 125 numbers"]),
        ("data.test_fraction=0.9", ["data.test_fraction", "data.validation_fraction", "less than 1"]),
        ("data.combination_fraction=1.2", ["data.combination_fraction", "less than or equal to 1"]),
        ("stage=9", ["stage", "9", "1, 2, 3, 4"]),
        ("profile=laptop", ["profile", "laptop", "cpu, rtx5080, h200"]),
        (r"paths.data_root=C:\data\pills", ["paths.data_root", "Windows path", "write /mnt/c/data/pills"]),
        (r"serve.model_path=d:models", ["serve.model_path", "write /mnt/d/models"]),
        (r"paths.data_root=\\server\pills", ["paths.data_root", "network path", "/mnt/server/pills"]),
        (r"paths.data_root=/mnt/c\pills", ["paths.data_root", "backslashes", "write /mnt/c/pills"]),
        ("train.lr=${train.speed}", ["train.lr", "train.speed"]),
        ("train.lr=${train.lr}", ["train.lr", "refers to something unusable"]),
    ],
)
def test_mistakes_are_reported_in_one_sentence(override, parts):
    if parts is None:
        assert load_settings(CONFIG, [override]).paths.run_root == Path.cwd() / "5"
        return
    message = sentence(override)
    assert all(part in message for part in parts), message


def test_arguments_are_checked_like_the_command_line():
    assert "write /mnt/c/pills" in sentence(data_root=r"C:\pills")
    assert "1, 2, 3, 4" in sentence(stage=7)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nseed: 2\n", ["seed", "written twice", "line 2"]),
        ("train:\n  lr: 0.1\n  lr: 0.2\n", ["lr", "written twice", "line 3"]),
        ("train:\n  lr: 0.1\ntrain.lr: 0.2\n", ["train.lr", "given twice"]),
        ("train:\n  bach_size: 8\n", ["train.bach_size", "did you mean train.batch_size?"]),
        ("profiles:\n  h200: {train.batchsize: 8}\n  cpu:\n", ["profiles.h200", "did you mean train.batch_size?"]),
        ("train: {lr: fast}\n", ["train.lr", "'fast'", "valid number"]),
        ("serve: {API_KEY: hush-hush}\n", ["serve.API_KEY", ".env"]),
        ("API_KEY: hush-hush\n", ["API_KEY", ".env"]),
        ('paths: {data_root: "C:\\data"}\n', ["cannot be read in line 1"]),
        ("paths: {data_root: C:\\data}\n", ["Windows path", "/mnt/c/data"]),
        ("a: [1\n", ["cannot be read"]),
        ("- 1\n", ["keys with values"]),
        ("stages: [1, 2]\n", ["stages", "named blocks"]),
    ],
)
def test_mistakes_in_a_file_are_reported_with_its_path(tmp_path, text, parts):
    file = write(tmp_path, text)
    message = sentence(path=file)
    assert all(part in message for part in [*parts, str(file)]), message
    assert "hush" not in message


def test_a_missing_or_unreadable_file(tmp_path):
    assert "No such file" in sentence(path=tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"seed: \xff\xfe")
    assert "not UTF-8" in sentence(path=tmp_path / "bad.yaml")


def test_secrets_are_refused_on_the_command_line():
    message = sentence("serve.api_key=hush-hush")
    assert ".env" in message and "hush" not in message


def test_off_is_a_word_and_short_exponents_are_numbers(tmp_path):
    settings = load_settings(write(tmp_path, "train: {amp: off, lr: 2e-4, compile: none}\n"))
    assert (settings.train.amp, settings.train.lr, settings.train.compile) == ("off", 2e-4, "none")


@pytest.mark.parametrize(
    ("gpu", "profile"),
    [
        (None, "cpu"),
        (("NVIDIA GeForce RTX 5080", 16303.0), "rtx5080"),
        (("NVIDIA H200", 143771.0), "h200"),
        (("NVIDIA GeForce RTX 4090", 24564.0), "rtx5080"),
        (("NVIDIA L40S", 46068.0), "h200"),
    ],
)
def test_profile_follows_the_machine(monkeypatch, gpu, profile):
    monkeypatch.setattr(config, "find_gpu", lambda: gpu)
    settings = load_settings(CONFIG)
    assert settings.profile == profile and settings.profile_reason.startswith("auto: ")
    assert load_settings(CONFIG, profile="cpu").profile_reason == "named in the command line"


@pytest.mark.parametrize(
    ("visible", "script", "gpu"),
    [
        (None, "echo NVIDIA H200, 143771", ("NVIDIA H200", 143771.0)),
        ("1", "echo NVIDIA A, 8192; echo NVIDIA B, 16384", ("NVIDIA B", 16384.0)),
        ("GPU-5f", "echo NVIDIA GB10, [N/A]", ("NVIDIA GB10", 0.0)),
        ("-1", "echo NVIDIA H200, 143771", None),
        (None, "echo driver mismatch; exit 9", None),
        (None, "true", None),
    ],
)
def test_gpu_is_found_with_nvidia_smi(tmp_path, monkeypatch, visible, script, gpu):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() == gpu


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(CONFIG).train.lr = 1.0


def test_misspelt_papermill_parameter():
    check_parameters(
        {"stage": 1, "profile": None, "Path": Path, "In": [], "Out": {}, "_i1": "stage"}, ["stage", "profile"]
    )
    with pytest.raises(SettingsError, match="stgae is not a parameter of this notebook: did you mean stage?"):
        check_parameters({"stage": 1, "stgae": 2}, ["stage", "profile"])


def test_command_line(capsys):
    words = ["--cfg", str(CONFIG), "train.batch_size=128", "dataloader.num_workers=12"]
    assert main(["config", *words]) == 0
    output = capsys.readouterr().out
    assert output.count("batch_size: 128") == 4 and "num_workers: 12" in output
    assert main(["train", *words, "train.bach_size=128"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "did you mean train.batch_size?" in errors
    with pytest.raises(SystemExit) as ended:
        main(["train", "--stgae", "2"])
    assert ended.value.code == 2


def test_command_line_process_imports_no_torch():
    code = "import sys, pillsnap.cli, pillsnap.config.load, pillsnap.runlog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    ended = subprocess.run(
        [sys.executable, "-m", "pillsnap", "config", "--stage", "9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "1, 2, 3, 4" in ended.stderr


def test_every_setting_is_in_the_file():
    tree = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for key in LEAF_KEYS:
        value = tree
        for part in key.split("."):
            assert part in value, f"{key} is missing in config.yaml"
            value = value[part]


def test_command_without_training_packages_reports_what_to_install(monkeypatch, capsys):
    from pillsnap import cli

    def without_torch(arguments):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setitem(cli.COMMANDS, "train", without_torch)
    assert cli.main(["train"]) == 2
    assert "pip install 'pillsnap[train]'" in capsys.readouterr().err


def test_interrupted_command_prints_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pillsnap.cli.parse", lambda argv: Namespace(action=interrupted, command="config"))
    assert main(["config"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "pillsnap: config was interrupted"
