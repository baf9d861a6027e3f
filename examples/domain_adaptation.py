"""Continue the pre-training of a model on text of your domain, from Python: domain_adaptation.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from tiny_model import save_tiny_model

from bertfast.training import PretrainSettings, pretrain

with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    documents = [  # all different, because the validation split is chosen by document
        "".join(f"Sample {20 * n + i} was measured twice. The second reading agreed.\n" for i in range(20))
        for n in range(20)
    ]
    (work / "text.txt").write_text("\n".join(documents))
    settings = PretrainSettings.of(
        init_from=sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model"),
        train_file=[f"{work}/text.txt"],
        validation_split_percentage=20,
        output_dir=f"{work}/adapted",
        max_seq_length=32,
        tokens_per_batch=256,
        max_steps=3,
    )
    metrics = pretrain(settings)
    print(f"validation loss {metrics['validation_loss']:.2f}")
    print(sorted(path.name for path in (work / "adapted").glob("*.json*")))
    # ['config.json', 'metrics.jsonl', 'origin.json', 'tokenizer.json', 'tokenizer_config.json']
