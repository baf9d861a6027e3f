"""Train LoRA adapters on a fused model with PEFT: lora.py [FOLDER]. Requires `pip install peft`."""

import sys

import peft
import torch

import bertfast

if len(sys.argv) > 1:
    base = bertfast.BertForSequenceClassification.from_pretrained(sys.argv[1])
else:
    base = bertfast.BertForSequenceClassification(bertfast.preset_config("tiny"))
model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4))
model.print_trainable_parameters()
print(bertfast.report(model))  # projections with adapters are called; the rest of each layer is fused

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
input_ids, labels = torch.randint(1000, 2000, (8, 32)), torch.randint(2, (8,))
for step in range(3):
    loss = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
