"""Train a masked-LM head in your own loop: training_loop.py [FOLDER]."""

import sys

import torch

from bertfast import BertForMaskedLM, preset_config

torch.manual_seed(0)
model = BertForMaskedLM.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else BertForMaskedLM(preset_config("tiny"))
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
input_ids = torch.randint(1000, 2000, (8, 32))
attention_mask = (torch.arange(32) < torch.randint(16, 33, (8, 1))).long()
masked = (torch.rand(8, 32) < 0.15) & attention_mask.bool()
labels = input_ids.masked_fill(~masked, -100)
inputs = input_ids.masked_fill(masked, 103)  # [MASK]

for step in range(5):
    loss = model(inputs, attention_mask=attention_mask, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
