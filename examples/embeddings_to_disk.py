"""Write sentence embeddings of a text file to disk: embeddings_to_disk.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from tiny_model import save_tiny_model

from bertfast.cli.main import main

with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    source = sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model")
    (work / "texts.txt").write_text("A short text.\nA text that is a little longer.\n")
    arguments = ["--input-file", f"{work}/texts.txt", "--output-dir", f"{work}/vectors", "--pooling", "mean"]
    if main(["embed", "--model-name-or-path", source, *arguments]) != 0:
        sys.exit(1)
    print(sorted(path.name for path in (work / "vectors").glob("part-*")))  # ['part-00000.safetensors']
