"""A detector on the stages of a timm network: what it starts from, what can't be its backbone, and that it learns."""

import logging

import pytest
import torch

from pillsnap.config.schema import SettingsError
from pillsnap.models.detector import build_detector, detection_loss

NAME = "tf_efficientnet_lite0+yolo11n.yaml"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("yolo11zz.yaml", "ultralytics has no network 'yolo11zz.yaml'"),
        ("tf_efficientnet_lite0+yolo11zz.yaml", "ultralytics has no network 'yolo11zz.yaml'"),
        ("resnet0+yolo11n.yaml", "timm has no network 'resnet0'"),
        ("vit_tiny_patch16_224+yolo11n.yaml", "has no maps at 1/8, 1/32 of the resolution"),
        ("tf_efficientnet_lite0+yolov3.yaml", "up to an SPPF layer can have another backbone"),
    ],
)
def test_what_cannot_be_a_detector_is_refused_with_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=f"model.detector.name: .*{sentence}"):
        build_detector(name)


def test_what_a_detector_starts_from_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    build_detector(NAME)
    assert "detector weights: ImageNet (tf_efficientnet_lite0 from the installed package" in caplog.text
    build_detector(NAME, pretrained=False)
    assert "detector weights: random initialisation (other weights take their place)" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    build_detector("mnasnet_050+yolo11n.yaml")  # timm has no weights of it
    warning = caplog.records[-1]
    assert warning.levelno == logging.WARNING
    assert "detector weights: RANDOM INITIALISATION (the weights of mnasnet_050 can't be had" in warning.getMessage()


def test_all_of_it_learns() -> None:
    """A few steps on one drawn photo halve the loss; the first layer of the backbone changes with it."""
    torch.manual_seed(0)
    network = build_detector(NAME).train()
    photo = torch.full((2, 3, 96, 96), 0.4)
    photo[:, :, 32:64, 24:72] = torch.tensor([0.9, 0.3, 0.2]).view(3, 1, 1)
    boxes, index = torch.tensor([[0.5, 0.5, 0.5, 1 / 3]] * 2), torch.tensor([0, 1])
    stem = network.model[0].encoder.conv_stem.weight
    before, losses = stem.detach().clone(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(12):
        loss = detection_loss(network, photo, boxes, index)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2, losses
    assert not torch.equal(before, stem)
