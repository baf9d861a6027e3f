"""Fine-tune with transformers' Trainer on batches without padding: trainer.py [FOLDER].

Requires `pip install accelerate`.
"""

import random
import sys
import tempfile

from transformers import Trainer, TrainingArguments

import bertfast

if len(sys.argv) > 1:
    model = bertfast.BertForSequenceClassification.from_pretrained(sys.argv[1])
else:
    model = bertfast.BertForSequenceClassification(bertfast.preset_config("tiny"))
random.seed(0)
samples = []
for row in range(64):
    low = 1000 if row % 2 else 1500  # the label decides which tokens a sample has
    samples.append({"input_ids": random.choices(range(low, low + 500), k=random.randint(4, 32)), "labels": row % 2})

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[]
    )
    trainer = Trainer(model, arguments, data_collator=bertfast.PaddingFreeCollator(), train_dataset=samples)
    print(trainer.train().metrics["train_loss"])
