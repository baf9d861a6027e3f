"""Operations and their contracts: one schema, one fake implementation, for all implementations."""

import pytest
import torch
from torch import Tensor

from bertfast.kernels.contracts import CONTRACTS, Contract
from bertfast.kernels.operation import operation


@pytest.mark.one_instruction_set
def test_all_implementations_have_the_schema_of_the_contract():
    names = {name.removeprefix("bertfast::") for name in torch._C._dispatch_get_all_op_names() if "bertfast::" in name}
    found = 0
    for name in names:
        implementation, _, operation_name = name.partition("_")
        if implementation in ("cpu", "cuda", "triton"):
            schema = str(getattr(torch.ops.bertfast, name).default._schema)
            expected = CONTRACTS[operation_name].schema
            assert schema.replace("SymInt", "int") == f"bertfast::{name}{expected}".replace("SymInt", "int")
            found += 1
    assert found >= len(CONTRACTS)


@pytest.mark.one_instruction_set
def test_parameters_that_differ_from_the_contract_are_refused(monkeypatch):
    def contract(x: Tensor, scale: float) -> Tensor:
        return x.new_empty(x.shape)

    def planted(scale, x):
        return x * scale

    monkeypatch.setitem(CONTRACTS, "planted", Contract("(Tensor x, float scale) -> Tensor", contract))
    with pytest.raises(TypeError, match=r"planted has the parameters \['scale', 'x'\], its contract \['x', 'scale'\]"):
        operation(planted)
