"""Export a model to ONNX, checked against the model: onnx_export.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from tiny_model import save_tiny_model

from bertfast.cli.main import main

with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    source = sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model")
    if main(["export", source, f"{work}/out", "--to", "onnx"]) != 0:
        sys.exit(1)
    print((work / "out" / "model.onnx").stat().st_size, "bytes")
