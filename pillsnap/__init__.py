__version__ = "0.1.0"

import os

# Read when ONNX Runtime is first imported, which reports to Microsoft otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
