"""One photo in, its drugs out, with Flask: MODEL_PATH=runs/demo/train/export flask --app examples/flask_app.py run

`curl -F image=@photo.jpg http://127.0.0.1:5000/predict`, or JSON: {"data": [[[r, g, b], ...], ...]}, the pixels of a
photo. The answers are those of the service, from the same models and the same config.yaml. Keys, rate limit and queue
are the service's: this app is for machines that nobody else can reach.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from flask import Flask, jsonify, request
from PIL import Image
from werkzeug.exceptions import HTTPException

from pillsnap.answer.gallery.recognise import open_identifier
from pillsnap.answer.identify import Identifier
from pillsnap.answer.imprint.setting import read_imprints
from pillsnap.config.load import find_root, load_settings
from pillsnap.errors import PillsnapError
from pillsnap.service.client.local import predict_local
from pillsnap.service.inference.model_manager import load

app = Flask(__name__)
settings = load_settings(find_root() / "config.yaml")
app.config["MAX_CONTENT_LENGTH"] = int(settings.serve.max_image_mb * 1e6)  # bytes


def opened(folder: Path) -> Identifier:
    """The models of a folder, as the service opens them."""
    threads = settings.serve.threads
    return read_imprints(open_identifier(folder, threads, settings.serve.engine), settings.identify.imprint, threads)


models = load(Path(os.environ["MODEL_PATH"]), opened)


class NoPhoto(PillsnapError):
    """A request without a photo."""


def photo_of_pixels(data: Any) -> bytes:
    """A PNG of the pixels, height x width x 3 numbers from 0 to 255."""
    try:
        pixels = np.array(data)
    except ValueError as error:
        raise NoPhoto("data has rows of different lengths.") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind not in "iu" or pixels.size == 0:
        raise NoPhoto("data must be the pixels of a photo: height x width x 3 whole numbers.")
    if pixels.min() < 0 or pixels.max() > 255:
        raise NoPhoto("data has numbers below 0 or above 255.")
    Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@app.post("/predict")
def predict() -> Any:
    """Identify the pills of a photo."""
    pipeline = request.args.get("pipeline", "single")
    if request.is_json:
        body = request.get_json()
        if not isinstance(body, dict) or "data" not in body:
            raise NoPhoto('The JSON has no field "data".')
        photo = photo_of_pixels(body["data"])
    elif "image" in request.files:
        photo = request.files["image"].read()
    else:
        raise NoPhoto('Send a photo in the form field "image", or its pixels as JSON in "data".')
    answer = predict_local(models, photo, pipeline, max_pixels=settings.data.max_pixels)
    return jsonify({"prediction": [pill["code"] for pill in answer["pills"]], **answer})


@app.errorhandler(PillsnapError)
def on_problem(error: PillsnapError) -> Any:
    """A photo that can't be used."""
    return jsonify({"detail": str(error)}), 422


@app.errorhandler(HTTPException)
def on_http_error(error: HTTPException) -> Any:
    """What Flask refuses, such as a request that is too large."""
    return jsonify({"detail": error.description}), error.code
