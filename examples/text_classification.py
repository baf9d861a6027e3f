"""Fine-tune a classifier of texts from Python: text_classification.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

from tiny_model import save_tiny_model

from bertfast.training import FinetuneSettings, finetune

with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    for split, count in {"train": 200, "validation": 40}.items():
        rows = [f"sample {n} {['disagreed', 'agreed'][n % 2]}\t{['bad', 'good'][n % 2]}\n" for n in range(count)]
        (work / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    settings = FinetuneSettings.of(
        model_name_or_path=sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(work / "model"),
        train_file=f"{work}/train.tsv",
        validation_file=f"{work}/validation.tsv",
        output_dir=f"{work}/tuned",
        learning_rate=1e-3,
    )
    results = finetune(settings, on_step=lambda step: print(f"step {step}") if step % 10 == 0 else None)
    print({name: round(value, 2) for name, value in results.items() if name.startswith("eval_")})
    print(sorted(path.name for path in (work / "tuned").glob("*.safetensors")))  # ['model.safetensors']
