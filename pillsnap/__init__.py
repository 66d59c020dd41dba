__version__ = "0.1.0"

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is first imported, which reports to Microsoft otherwise
