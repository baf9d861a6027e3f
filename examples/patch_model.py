"""Fuse a transformers model in place, compare its output, and undo it: patch_model.py [FOLDER]."""

import sys

import torch
import transformers

import bertfast

if len(sys.argv) > 1:
    model = transformers.AutoModel.from_pretrained(sys.argv[1])
else:
    model = transformers.BertModel(bertfast.preset_config("tiny"))
model.eval()
input_ids = torch.randint(1000, 2000, (8, 64))
attention_mask = (torch.arange(64) < torch.randint(8, 65, (8, 1))).long()

with torch.no_grad():
    before = model(input_ids, attention_mask=attention_mask).pooler_output
    print(bertfast.patch(model))  # fused: 3 (the embeddings and two layers), left to transformers: 0
    after = model(input_ids, attention_mask=attention_mask).pooler_output
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
bertfast.unpatch(model)
print("outputs agree")
