"""Write sentence embeddings of a text file to disk: embeddings_to_disk.py [FOLDER]."""

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
    (work / "texts.txt").write_text("A short text.\nA text that is a little longer.\n")
    arguments = ["--input-file", f"{work}/texts.txt", "--output-dir", f"{work}/vectors", "--pooling", "mean"]
    if main(["embed", "--model-name-or-path", source, *arguments]) != 0:
        sys.exit(1)
    print(sorted(path.name for path in (work / "vectors").iterdir()))
