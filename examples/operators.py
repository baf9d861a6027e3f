"""Build one encoder sub-layer from the operators on packed tokens: operators.py."""

import torch

from bertfast import ops

torch.manual_seed(0)
lengths, heads, head_dimension = [5, 7, 20], 2, 32
tokens, hidden = sum(lengths), heads * head_dimension
x = torch.randn(tokens, hidden, requires_grad=True)
qkv_weight = torch.randn(3 * hidden, hidden) / hidden**0.5
output_weight = torch.randn(hidden, hidden) / hidden**0.5
bias, gamma, beta = torch.zeros(hidden), torch.ones(hidden), torch.zeros(hidden)

qkv = (x @ qkv_weight.T).view(tokens, 3, heads, head_dimension)
context = ops.attention(qkv, lengths, dropout=0.1).flatten(1)  # [tokens, hidden]
y = ops.add_layer_norm(context @ output_weight.T, x, bias, gamma, beta, 1e-12, dropout=0.1)
(gradient,) = torch.autograd.grad(y.square().sum(), x)
print("output", list(y.shape), "gradient", list(gradient.shape))  # output [32, 64] gradient [32, 64]
