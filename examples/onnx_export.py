"""Export a model to ONNX, checked against the model: onnx_export.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from bertfast import BertForPreTraining, preset_config
from bertfast.cli.main import main
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer


def save_tiny_model(folder: Path) -> str:
    """Write a random BERT with a tokenizer of its own and return its path."""
    tokenizer = train_tokenizer(["A short text. The second reading of a sample agreed with the first."] * 20, 200)
    BertForPreTraining(preset_config("tiny", vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    source = sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model")
    if main(["export", source, f"{work}/out", "--to", "onnx"]) != 0:
        sys.exit(1)
    print((work / "out" / "model.onnx").stat().st_size, "bytes")
