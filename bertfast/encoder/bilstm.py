"""A bidirectional LSTM on packed tokens, between an encoder and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence


class BiLSTM(nn.Module):
    """An LSTM in both directions over each of T packed tokens' sequences: [T, inputs] -> [T, 2 · size]."""

    def __init__(self, inputs: int, size: int, layers: int = 2):
        super().__init__()
        self.lstm = nn.LSTM(inputs, size, layers, bidirectional=True)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        present = [length for length in lengths if length]
        sequences = pack_sequence([*torch.split(x[: sum(present)], present)], enforce_sorted=False)
        rows, _ = pad_packed_sequence(self.lstm(sequences)[0], batch_first=True)
        output = torch.cat([row[:length] for row, length in zip(rows, present, strict=True)])
        return torch.cat([output, output.new_zeros(len(x) - len(output), output.shape[1])])  # zero in padding slots
