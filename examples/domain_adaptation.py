"""Continue the pre-training of a model on text of your domain: domain_adaptation.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from tiny_model import save_tiny_model

from bertfast.cli.main import main

with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    source = sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model")
    documents = [  # all different, because the validation split is chosen by document
        "".join(f"Sample {20 * n + i} was measured twice. The second reading agreed.\n" for i in range(20))
        for n in range(20)
    ]
    (work / "text.txt").write_text("\n".join(documents))
    sizes = ["--max-seq-length", "32", "--tokens-per-batch", "256", "--max-steps", "3"]
    split = ["--validation-split-percentage", "20"]
    arguments = ["--train-file", f"{work}/text.txt", "--output-dir", f"{work}/adapted", *sizes, *split]
    if main(["pretrain", "--init-from", source, *arguments]) != 0:
        sys.exit(1)
    print(sorted(path.name for path in (work / "adapted").glob("*.json*")))
    # ['config.json', 'metrics.jsonl', 'origin.json', 'tokenizer.json', 'tokenizer_config.json']
