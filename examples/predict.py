"""Which pills are in a photo, by a server: API_KEY=... python examples/predict.py photo.jpg http://localhost:8000"""

import os
import sys
from pathlib import Path

from pillsnap.answer.pills import percent
from pillsnap.service.client.photos import ClientError
from pillsnap.service.client.remote import predict_remote

photo, url = Path(sys.argv[1]), sys.argv[2]
try:
    answer = predict_remote(url, os.environ.get("API_KEY", ""), photo, pipeline="combo")
except ClientError as error:
    sys.exit(f"{photo}: {error}")
for pill in answer["pills"]:
    doubt = "" if pill["verdict"] == "identified" else f" ({pill['verdict']})"
    print(f"{pill['code']} {pill['name']} {percent(pill['confidence'])}{doubt}")
for note in answer["notes"]:
    print(note)
