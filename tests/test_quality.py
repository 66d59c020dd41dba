"""The ranking of photos by quality: names and defaults of its reference, bad input, and from a table to scores."""

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision import transforms

import pillsnap.quality as quality
from pillsnap.config.schema import SettingsError
from pillsnap.errors import PillsnapError
from pillsnap.models.classifier import PACKAGED_WEIGHTS
from pillsnap.quality import (
    DataSplitter,
    DINOv2FeatureExtractor,
    Evaluator,
    PairwiseDataset,
    PairwiseRankingModel,
    PerformanceBenchmarks,
    Projector,
    Trainer,
    TrainingConfig,
    set_seed,
)
from pillsnap.quality.pairs.features import FeaturePairs, extract_features
from pillsnap.quality.ranking.errors import BackboneError, MetadataError, PairLabelError
from pillsnap.training.checkpoint import CheckpointError

SMALL = "random:test_efficientnet"

SIGNATURES = {  # name: its parameters with their defaults, "" where there is none
    "DINOv2FeatureExtractor": {"model_name": "facebook/dinov2-large", "device": None},
    "DINOv2FeatureExtractor.extract": {"images": ""},
    "DINOv2FeatureExtractor.forward": {"images": ""},
    "Projector": {"input_dim": 1024, "hidden_dim": 512, "output_dim": 256, "dropout": 0.1},
    "Projector.forward": {"x": ""},
    "PairwiseRankingModel": {
        "backbone_name": "facebook/dinov2-large",
        "projector_output_dim": 256,
        "freeze_backbone": True,
        "margin": 1.0,
        "device": None,
    },
    "PairwiseRankingModel.forward": {"img1": "", "img2": ""},
    "PairwiseRankingModel.compute_loss": {"score1": "", "score2": "", "labels": ""},
    "PairwiseRankingModel.get_score": {"image": ""},
    "TrainingConfig": {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_epochs": 100,
        "gradient_clip_norm": 1.0,
        "early_stopping_patience": 10,
        "scheduler_t_max": 100,
        "scheduler_eta_min": 1e-6,
        "checkpoint_dir": "./checkpoints",
        "save_every_n_epochs": 5,
        "wandb_enabled": False,
        "wandb_project": None,
        "wandb_run_name": None,
        "device": "cuda",
        "seed": 42,
    },
    "Trainer": {"model": "", "config": ""},
    "Trainer.fit": {"train_loader": "", "val_loader": None},
    "Trainer.train_epoch": {"dataloader": ""},
    "Trainer.validate": {"dataloader": ""},
    "Trainer.save_checkpoint": {"filepath": "", "epoch": "", "accuracy": ""},
    "Trainer.load_checkpoint": {"filepath": ""},
    "Evaluator": {"model": "", "device": None},
    "Evaluator.evaluate": {"dataloader": ""},
    "Evaluator.evaluate_detailed": {"dataloader": ""},
    "Evaluator.predict_pair": {"img1": "", "img2": ""},
    "PerformanceBenchmarks": {"model": "", "device": None},
    "PerformanceBenchmarks.measure_inference_time": {"num_pairs": 100, "warmup_iterations": 10, "image_size": 768},
    "PerformanceBenchmarks.measure_memory_usage": {"batch_size": 32, "image_size": 768},
    "PerformanceBenchmarks.measure_training_memory": {"batch_size": 32, "image_size": 768},
    "PerformanceBenchmarks.estimate_training_time": {"num_epochs": 100, "samples_per_epoch": 10000, "batch_size": 32},
    "PerformanceBenchmarks.validate_reproducibility": {"dataloader": "", "seed": 42, "num_runs": 2},
    "PerformanceBenchmarks.run_full_benchmark": {"batch_size": 32, "image_size": 768},
    "PairwiseDataset": {
        "metadata": "",
        "image_dir": "",
        "transform": None,
        "tier_column": "tier",
        "filename_column": "filename",
    },
    "DataSplitter": {"train_ratio": 0.8, "val_ratio": 0.1, "test_ratio": 0.1, "seed": 42, "stratify_column": None},
    "DataSplitter.split": {"data": ""},
    "DataSplitter.get_split_info": {},
    "set_seed": {"seed": 42},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_and_defaults_are_those_of_the_reference(name: str):
    value = quality
    for part in name.split("."):
        value = getattr(value, part)
    found = {
        parameter.name: "" if parameter.default is inspect.Parameter.empty else parameter.default
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name != "self"
    }
    assert found == SIGNATURES[name]


def test_limits_are_those_of_the_reference():
    limits = PerformanceBenchmarks
    assert (limits.MAX_INFERENCE_TIME_SECONDS, limits.MAX_MEMORY_GB, limits.TARGET_TRAINING_HOURS) == (0.1, 12.0, 6.0)


@pytest.fixture
def photos(tmp_path: Path) -> tuple[pd.DataFrame, Path]:
    """Sixty noisy pictures, the brighter the better."""
    rng, rows = np.random.default_rng(7), []
    for tier, level in zip("SABC", (215, 160, 100, 45)):
        for number in range(15):
            pixels = np.clip(rng.normal(level + rng.uniform(-15, 15), 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            rows.append({"filename": f"{tier}{number}.png", "tier": tier})
            Image.fromarray(pixels).save(tmp_path / rows[-1]["filename"])
    return pd.DataFrame(rows), tmp_path


def settings(folder: Path, **more: object) -> TrainingConfig:
    values = {"max_epochs": 12, "learning_rate": 1e-3, "early_stopping_patience": 0, "device": "cpu"}
    return TrainingConfig(**{**values, "checkpoint_dir": str(folder / "checkpoints"), **more})


def test_from_a_table_to_scores_of_photos_that_were_not_trained_on(photos: tuple[pd.DataFrame, Path]):
    """Split, cached features, training, checkpoint, evaluation, and scores of images."""
    table, folder = photos
    model = PairwiseRankingModel(SMALL, device="cpu")
    splits = DataSplitter(0.6, 0.2, 0.2, stratify_column="tier").split(table)
    assert [len(part) for part in splits] == [36, 12, 12]
    datasets = [PairwiseDataset(part, str(folder), transforms.ToTensor()) for part in splits]
    assert [len(dataset) for dataset in datasets] == [12 * 9**2, 12 * 3**2, 12 * 3**2]
    train, val, test = (
        FeaturePairs(dataset, extract_features(dataset, model.feature_extractor, folder / "cache"))
        for dataset in datasets
    )
    config = settings(folder)
    history = Trainer(model, config).fit(DataLoader(train, 64, shuffle=True), DataLoader(val, 64))
    assert len(history["val_acc"]) == 12 and max(history["val_acc"]) > 0.95
    assert Evaluator(model).evaluate(DataLoader(test, 64)) > 0.95
    torch.manual_seed(0)
    other = PairwiseRankingModel(SMALL, device="cpu")
    other.feature_extractor.load_state_dict(model.feature_extractor.state_dict())  # random weights are in no file
    content = Trainer(other, config).load_checkpoint(str(folder / "checkpoints" / "best.pt"))
    best, bad = (datasets[2].photo(list(datasets[2].ranks).index(rank))[1][None] for rank in (0, 3))
    assert torch.equal(other.get_score(best), model.get_score(best)) and content["accuracy"] == max(history["val_acc"])
    assert Evaluator(model).predict_pair(best, bad)[0] == 1 and Evaluator(model).predict_pair(bad, best)[0] == -1
    assert Evaluator(model).predict_pair(best, best)[0] == 0


def test_a_training_is_the_same_from_the_same_seed(photos: tuple[pd.DataFrame, Path]):
    table, folder = photos
    histories = []
    for _ in range(2):
        set_seed(3)
        model = PairwiseRankingModel(SMALL, device="cpu")
        dataset = PairwiseDataset(table, str(folder), transforms.ToTensor())
        dataset.draw(at_most=200)
        trainer = Trainer(model, settings(folder, max_epochs=1))
        histories.append(trainer.fit(DataLoader(dataset, 32, shuffle=True)))
    assert histories[0] == histories[1] and histories[0]["val_acc"] == []


# The four errors of the reference, by their types


def test_an_invalid_tier_is_a_value_error(photos: tuple[pd.DataFrame, Path]):
    table, folder = photos
    with pytest.raises(ValueError, match=r"^Invalid tier value 'D' in row 7 of the column 'tier': use one of S"):
        PairwiseDataset(table.assign(tier=["S"] * 7 + ["D"] * 53), str(folder))


def test_a_missing_image_is_a_file_not_found_error(photos: tuple[pd.DataFrame, Path]):
    table, folder = photos
    (folder / "S3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"^Image not found: .*S3.png of row 3 of 60: check") as caught:
        PairwiseDataset(table, str(folder))
    assert isinstance(caught.value, PillsnapError)
    with pytest.raises(FileNotFoundError, match="and 59 more"):
        PairwiseDataset(table, str(folder / "nowhere"))


@pytest.mark.parametrize("ratios", [(0.8, 0.1, 0.2), (0.5, 0.2, 0.2), (1.5, -0.25, -0.25), (float("nan"), 0.5, 0.5)])
def test_ratios_that_do_not_add_up_are_an_assertion_error(ratios: tuple[float, float, float]):
    with pytest.raises(AssertionError, match=r"^Ratios must sum to 1.0") as caught:
        DataSplitter(*ratios)
    assert isinstance(caught.value, PillsnapError)


def test_a_lack_of_memory_is_a_runtime_error(photos: tuple[pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch):
    table, folder = photos
    model = PairwiseRankingModel(SMALL, device="cpu")

    def exhausted(*images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(model, "forward", exhausted)
    loader = DataLoader(PairwiseDataset(table, str(folder), transforms.ToTensor()), 32)
    with pytest.raises(RuntimeError, match="out of memory with batches of 32 pairs: lower batch_size") as caught:
        Trainer(model, settings(folder)).fit(loader)
    assert isinstance(caught.value, PillsnapError)
    with pytest.raises(RuntimeError, match="out of memory with batches of 1 pair: lower batch_size"):
        PerformanceBenchmarks(model).run_full_benchmark(8, 32)
    with pytest.raises(RuntimeError, match="out of memory with batches of 8 pairs"):
        PerformanceBenchmarks(model).measure_memory_usage(8, 32)


# Other bad input: one sentence each


@pytest.mark.parametrize("labels", [[1, 0], [0, 0], [2, -1], [0.5, 1], [float("nan"), 1], [1, -1, 1], [[1, -1]]])
def test_labels_are_1_and_minus_1(labels: list):
    model = PairwiseRankingModel(SMALL, device="cpu")
    scores = torch.zeros(2, 1)
    with pytest.raises(PairLabelError, match="label"):
        model.compute_loss(scores, scores, torch.tensor(labels))
    assert model.compute_loss(scores, scores, torch.tensor([[1], [-1]])).item() == 1.0


def test_metadata_without_the_columns_names_them(photos: tuple[pd.DataFrame, Path]):
    table, folder = photos
    with pytest.raises(MetadataError, match="no column 'grade', only filename, tier"):
        PairwiseDataset(table, str(folder), tier_column="grade")
    renamed = table.rename(columns={"tier": "grade", "filename": "file"})
    assert len(PairwiseDataset(renamed, str(folder), None, "grade", "file")) == 12 * 15**2
    with pytest.raises(MetadataError, match="at least two of S, A, B, C"):
        PairwiseDataset(table[:15], str(folder))


def test_a_damaged_photo_is_replaced_by_one_of_its_tier_and_named(
    photos: tuple[pd.DataFrame, Path], caplog: pytest.LogCaptureFixture
):
    table, folder = photos
    (folder / "A4.png").write_bytes((folder / "A4.png").read_bytes()[:200])
    dataset = PairwiseDataset(table, str(folder), transforms.ToTensor())
    dataset.draw(at_most=480)
    history = Trainer(PairwiseRankingModel(SMALL, device="cpu"), settings(folder, max_epochs=1)).fit(
        DataLoader(dataset, 64)
    )
    assert len(history["train_loss"]) == 1 and caplog.text.count("A4.png") == 1
    assert torch.equal(dataset.photo(19)[1], dataset.photo(20)[1])


def test_pairs_are_drawn_and_not_made(tmp_path: Path):
    """3,000 photos of each tier make 108 million pairs."""
    rows = [{"filename": f"{tier}{number}", "tier": tier} for tier in "SABC" for number in range(3000)]
    for row in rows:
        (tmp_path / row["filename"]).touch()
    table, begun = pd.DataFrame(rows), time.perf_counter()
    dataset = PairwiseDataset(table, str(tmp_path))
    assert len(dataset) == 10_000 and time.perf_counter() - begun < 10
    before = dataset.pairs.copy()
    dataset.draw(seed=1)
    assert len(dataset) == 10_000 and not np.array_equal(before, dataset.pairs)


def test_weights_that_cannot_be_had_end_cleanly(monkeypatch: pytest.MonkeyPatch):
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BackboneError, match="weights of facebook/dinov2-small can't be had.*tf_efficientnet_lite0"):
        DINOv2FeatureExtractor("facebook/dinov2-small", device="cpu")


def test_weights_of_a_folder_are_loaded(tmp_path: Path):
    """The real way of pretrained weights, from a folder in the hub's format."""
    torch.manual_seed(5)
    network = timm.create_model("test_vit", img_size=70, patch_size=14, num_classes=0)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "num_classes": 0,
        "num_features": 64,
        "model_args": {"img_size": 70, "patch_size": 14},
        "pretrained_cfg": {"input_size": [3, 70, 70], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    extractor = DINOv2FeatureExtractor(f"local-dir:{tmp_path}", device="cpu")
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert torch.allclose(extractor.extract(images), network.eval()(images), atol=1e-5)
    assert extractor.output_dim == 64 and extractor.patch == 14 and extractor.extract(images[..., :64]).shape == (2, 64)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_packaged_weights_are_used_and_said(name: str, caplog: pytest.LogCaptureFixture):
    pytest.importorskip(PACKAGED_WEIGHTS[name])
    with caplog.at_level("INFO", "pillsnap"):
        extractor = DINOv2FeatureExtractor(name, device="cpu")
    assert "in place of a DINOv2" in caplog.text and "from the installed package" in caplog.text
    features = extractor.extract(torch.randn(2, 3, 64, 64))
    assert extractor.output_dim == features.shape[1] == 1280 and features.std() > 0.05


def test_768_pixels_become_770_for_dinov2_and_it_is_said(caplog: pytest.LogCaptureFixture):
    extractor = DINOv2FeatureExtractor("random:facebook/dinov2-small", device="cpu")
    with caplog.at_level("INFO", "pillsnap"):
        assert extractor(torch.randn(1, 3, 768, 28)).shape == (1, 384)
        extractor(torch.randn(1, 3, 768, 28))
    assert caplog.text.count("770 x 28") == 1 and "no multiple of its patch of 14 pixels" in caplog.text


OTHER = [{"projector_output_dim": 64}, {"freeze_backbone": False}, {"backbone_name": "random:test_efficientnet_gn"}]


@pytest.mark.parametrize("change", OTHER)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path, change: dict):
    trainer = Trainer(PairwiseRankingModel(SMALL, device="cpu"), settings(tmp_path))
    path = str(tmp_path / "some.pt")
    trainer.save_checkpoint(path, epoch=3, accuracy=0.5)
    other = PairwiseRankingModel(**{"backbone_name": SMALL, "device": "cpu", **change})
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="build the model with"):
        Trainer(other, settings(tmp_path)).load_checkpoint(path)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_missing_or_damaged_checkpoint_is_a_sentence(tmp_path: Path, content: bytes | None):
    path = tmp_path / "best.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="best.pt"):
        Trainer(PairwiseRankingModel(SMALL, device="cpu"), settings(tmp_path)).load_checkpoint(str(path))


def test_a_training_goes_on_without_wandb(photos: tuple[pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch):
    table, folder = photos
    dataset = PairwiseDataset(table, str(folder), transforms.ToTensor())
    dataset.draw(at_most=24)
    loader = DataLoader(dataset, 12)
    config = settings(folder, max_epochs=1, wandb_enabled=True, wandb_project="mirip-ranking")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert Trainer(PairwiseRankingModel(SMALL, device="cpu"), config).fit(loader)["train_acc"]
    sent: list[dict] = []
    run = SimpleNamespace(log=lambda values, step: sent.append(values), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: run))
    Trainer(PairwiseRankingModel(SMALL, device="cpu"), config).fit(loader)
    assert set(sent[0]) == {"train_loss", "train_acc", "learning_rate"}


@pytest.mark.parametrize("wrong", [{"max_epochs": 0}, {"learning_rate": -1.0}, {"gradient_clip_norm": float("inf")}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_a_frozen_backbone_stays_frozen_through_a_training(photos: tuple[pd.DataFrame, Path]):
    table, folder = photos
    dataset = PairwiseDataset(table, str(folder), transforms.ToTensor())
    dataset.draw(at_most=24)
    loader = DataLoader(dataset, 12)
    for frozen in (True, False):
        model = PairwiseRankingModel("tf_efficientnet_lite0", freeze_backbone=frozen, device="cpu")
        before = {key: tensor.clone() for key, tensor in model.feature_extractor.state_dict().items()}
        Trainer(model, settings(folder, max_epochs=1)).fit(loader)
        same = [torch.equal(before[key], tensor) for key, tensor in model.feature_extractor.state_dict().items()]
        assert all(same) if frozen else not any(same)


def test_projector_has_the_layers_of_the_reference():
    kinds = [type(part).__name__ for part in Projector(1024, 512, 256, 0.1).modules()]
    assert kinds[2:] == ["Linear", "LayerNorm", "GELU", "Dropout", "Linear", "LayerNorm"]


def test_what_serving_applies_imports_no_torch():
    code = "import sys, pillsnap.answer.quality.judge; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
