"""Error messages for tensors that do not match an operator's description."""

import pytest
import torch

from bertfast.ops.arguments import Arguments
from bertfast.ops.dropout import Dropout

OPERATION = Arguments(
    "operation", x="floating [tokens, 3, hidden]", bias="optional floating [hidden]", rows="each integer [tokens]"
)
X, BIAS, ROWS = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(2, dtype=torch.int32)


def test_matching_tensors_pass():
    OPERATION.check(X, BIAS, ROWS)
    OPERATION.check(X.half(), None, ROWS, ROWS.long(), ROWS)
    OPERATION.check(X, BIAS, ROWS, dropout=Dropout(0.1, torch.tensor(1), 0, ROWS, ROWS))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (([1.0], BIAS, ROWS), TypeError, "operation: x must be a tensor, got list"),
        ((None, BIAS, ROWS), TypeError, "operation: x must be a tensor, got NoneType"),
        ((X, BIAS, ROWS, None), TypeError, "operation: rows[1] must be a tensor, got NoneType"),
        ((X[:, :2], BIAS, ROWS), ValueError, "operation: x must have shape [2, 3, 4], got [2, 2, 4]"),
        ((X[0], BIAS, ROWS), ValueError, "operation: x must have shape [tokens, 3, hidden], got [3, 4]"),
        ((X, BIAS[1:], ROWS), ValueError, "operation: bias must have shape [4], got [3]"),
        ((X, BIAS, ROWS, ROWS[1:]), ValueError, "operation: rows[1] must have shape [2], got [1]"),
        ((X.int(), BIAS, ROWS), TypeError, "operation: x must be floating point, got torch.int32"),
        ((X, BIAS, ROWS.bool()), TypeError, "operation: rows[0] must be int64 or int32, got torch.bool"),
        ((X, BIAS.to("meta"), ROWS), ValueError, "operation: bias is on meta, the other tensors are on cpu"),
    ],
)
def test_a_mismatch_is_named(tensors, error, message):
    with pytest.raises(error) as raised:
        OPERATION.check(*tensors)
    assert str(raised.value) == message


def test_dropout_with_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"operation: dropout.positions must have shape \[2\], got \[1\]"):
        OPERATION.check(X, BIAS, ROWS, dropout=Dropout(0.1, torch.tensor(1), 0, ROWS, ROWS[1:]))
