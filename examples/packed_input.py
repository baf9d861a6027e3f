"""Give a model concatenated sequences instead of a padded batch: packed_input.py [FOLDER]."""

import sys

import torch

from bertfast import BertModel, PaddingFreeCollator, preset_config

model: BertModel = BertModel.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else BertModel(preset_config("tiny"))
model.eval()
sequences = [torch.randint(1000, 2000, (length,)) for length in (5, 12, 31)]
batch = PaddingFreeCollator()([{"input_ids": sequence.tolist()} for sequence in sequences])
print("cu_seq_lens_q:", batch["cu_seq_lens_q"])  # tensor([ 0,  5, 17, 48], dtype=torch.int32)

with torch.no_grad():
    packed = model(**batch).last_hidden_state[0]  # [48, hidden]
    alone = model(sequences[1][None]).last_hidden_state[0]  # [12, hidden]
torch.testing.assert_close(packed[5:17], alone, rtol=1e-4, atol=1e-4)
print("a sequence has the same output packed and alone")
