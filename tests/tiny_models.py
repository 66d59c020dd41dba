"""Four real, tiny ONNX models, photos for them, and the service that has them.

The detector always returns the same two pills, the classifier compares the average colour of a crop, the judge takes
the brightness of a pill for its quality, and the segmenter what is bright for the pill.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import onnx
from fastapi.testclient import TestClient
from httpx import Response
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pillsnap.answer.classes import ClassMap, Drug
from pillsnap.answer.outlines import FADED, OUTLINE_MARGIN
from pillsnap.answer.quality.rules import QualityRules
from pillsnap.answer.rules import Rules
from pillsnap.config.environment import Environment
from pillsnap.config.load import load_settings
from pillsnap.serve import create_app

CONFIG = Path(__file__).parents[1] / "config.yaml"
RIGHT, ANOTHER = "jC2-9wqXr_LmT4vYd0Ks", "q7Wm2-Lk0vR_t8Yc5n"
KEY = {"X-API-Key": RIGHT}
DRUGS = ClassMap(
    [
        Drug("K-000007", "Red capsule", ("641600010", "641600011"), {"shape": "oblong", "company": "Example Pharma"}),
        Drug("K-000030", "White round tablet", ("649900030",)),
        Drug("K-000101", "Blue tablet"),
    ]
)
COLOURS = np.array([[0.68, 0.36, 0.33], [0.83, 0.81, 0.77], [0.3, 0.4, 0.8]], np.float32)
FOUND = np.array([[110, 140, 86, 86, 0.94], [228, 204, 106, 62, 0.88], [111, 141, 84, 86, 0.6]], np.float32)
RULES = Rules(
    class_map=DRUGS,
    classifier_size=64,
    detector_size=320,
    margin=0.12,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    box_confidence=0.25,
    nms_iou=0.5,
    sure_confidence=0.5,
)


def save_model(
    path: Path,
    task: str,
    nodes: list,
    shapes: tuple[list, ...],
    constants: dict[str, np.ndarray],
    rules: Rules | QualityRules | None = None,  # None = RULES, which tests replace
    **more: object,  # metadata
) -> None:
    images, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("images", "output", "embeddings"), shapes)
    )
    initial = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, task, [images], outputs, initial),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    metadata = {
        "task": task,
        "rules": (rules or RULES).to_json(),
        "model": f"tiny {task}",
        "opset": 17,
        "git_revision": "",
        "created": "",
        "weights_sha256": f"{task} of {sum(map(len, shapes))}",
        **more,
    }
    helper.set_model_props(model, {"pillsnap": json.dumps(metadata)})
    onnx.save(model, path)


def save_classifier(folder: Path, embeddings: bool = False) -> None:
    """With embeddings, the second output is the average colour of a crop, in any brightness."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["average"]),
        helper.make_node("Gemm", ["average", "weights", "bias"], ["output"], transB=1),
    ]
    constants = {"weights": 60 * COLOURS, "bias": -30 * (COLOURS**2).sum(axis=1)}
    if embeddings:
        nodes.append(helper.make_node("LpNormalization", ["average"], ["embeddings"], axis=1))
    shapes = (["n", 3, 64, 64], ["n", 3], *([["n", 3]] if embeddings else []))
    save_model(folder / "classifier.onnx", "classifier", nodes, shapes, constants)


def save_detector(folder: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["average"], keepdims=0),
        helper.make_node("Mul", ["average", "nothing"], ["zero"]),
        helper.make_node("Add", ["found", "zero"], ["output"]),
    ]
    constants = {"found": FOUND.T[None], "nothing": np.zeros(1, np.float32)}
    save_model(folder / "detector.onnx", "detector", nodes, ([1, 3, 320, 320], [1, 5, len(FOUND)]), constants)


def save_segmenter(folder: Path, level: float = 0.64, margin: float = OUTLINE_MARGIN) -> None:
    """What has a channel brighter than a level, and has not been faded, is the pill."""
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["brightest"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["brightest", "level"], ["above"]),
        helper.make_node("Mul", ["above", "contrast"], ["output"]),
    ]
    constants = {"level": np.array([level], np.float32), "contrast": np.array([30], np.float32)}
    shapes = (["n", 3, 96, 96], ["n", 1, 96, 96])
    made = {"outline_margin": margin, "faded": FADED}
    save_model(folder / "segmenter.onnx", "segmenter", nodes, shapes, constants, **made)


def save_quality(folder: Path, accept: float = 0.5) -> None:
    """A judge whose score is the brightness of the pill; what is missing is "too dark"."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["average"]),
        helper.make_node("Gemm", ["average", "weights", "bias"], ["output"], transB=1),
    ]
    weights, bias = np.zeros((11, 6), np.float32), np.zeros(11, np.float32)
    weights[0, 3:], weights[3, 3:], bias[3] = 0.333, -0.333, 1
    rules = QualityRules(64, 0.25, (0.0,) * 3, (1.0,) * 3, (0.8, 0.5, 0.2), (0.6,) * 10, accept)
    shapes = (["n", 6, 64, 64], ["n", 11])
    save_model(folder / "quality.onnx", "quality", nodes, shapes, {"weights": weights, "bias": bias}, rules)


def photo_jpeg(light: float = 1.0) -> bytes:
    """A photo of a white tablet and a red capsule, at the boxes of the detector; with less light it is darker."""
    photo = np.full((480, 640, 3), (128, 122, 112), np.uint8)
    cv2.ellipse(photo, (220, 200), (84, 84), 0, 0, 360, (238, 234, 224), -1, cv2.LINE_AA)
    cv2.ellipse(photo, (456, 328), (110, 46), 25, 0, 360, (196, 74, 66), -1, cv2.LINE_AA)
    buffer = io.BytesIO()
    Image.fromarray((photo * light).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG of 100 million pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 10_000, 10_001, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1251 * 10_001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def client_for(
    folder: Path | None, keys: tuple[str, ...] = (RIGHT, ANOTHER), *settings: str, **more: object
) -> TestClient:
    environment = Environment(api_keys=keys, model_path=folder, cors_allow_origins=["https://pillsnap.co.kr"], **more)
    return TestClient(
        create_app(load_settings(CONFIG, settings or ["serve.requests_per_minute=0"]), environment),
        raise_server_exceptions=False,
    )


def post_photo(client: TestClient, photo: bytes, query: str = "", headers: dict[str, str] = KEY) -> Response:
    return client.post(f"/predict{query}", headers=headers, files={"image": ("photo.jpg", photo, "image/jpeg")})


def check_error(response: Response, status: int, word: str = "") -> None:
    """Check an error response: status, one sentence, a code, the request id, and no internals of the server."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"detail", "code", "request_id"} and response.headers.get_list("x-request-id") == [
        response.json()["request_id"]
    ]
    assert response.json()["code"].replace("_", "").isalpha() and len(response.json()["request_id"]) == 32
    detail = response.json()["detail"]
    assert isinstance(detail, str) and word in detail and "Traceback" not in detail and len(detail.split()) > 1
