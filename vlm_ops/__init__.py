"""How one thing is computed: reading, decoding, models, ops, index. Never Apache Beam."""

import os

# ONNX Runtime would send to Microsoft what it runs, and keep a number of the machine in the user's cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
