"""Unpadding: slots, query-only tokens, buckets, waits for the device, and compilation."""

import pytest
import torch
from parity import CASES, SIZES, attended, inputs, models
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bertfast
from bertfast import encoder
from bertfast.encoder.unpadding import Layout, unpad
from bertfast.ops.sequences import Sequences, bucket

BY_NAME = {case.name: case for case in CASES}
PADDINGS = ["none", "right", "first", "inside"]
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select)
        return operation(*args, **(kwargs or {}))


def counted(calls: list, function):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def test_each_slot_holds_its_token():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    ids = torch.arange(12).view(3, 4) + 10
    packed, layout = unpad(ids, mask, positions=4)
    assert packed.token_ids.tolist() == [10, 11, 13, 16, 17, 0, 14, 18]
    assert packed.sequences.cu_seqlens.tolist() == [0, 3, 5, 5]
    assert (packed.sequences.capacity, packed.query_only) == (8, 3)
    assert packed.first.tolist() == [0, 6, 7], "two rows have a query-only token"
    assert packed.position_ids.tolist() == [0, 1, 3, 2, 3, 0, 0, 0]
    padded = layout.pad(torch.arange(1.0, 9.0))
    assert padded.tolist() == [[1, 2, 0, 3], [7, 0, 4, 5], [8, 0, 0, 0]]


def test_query_only_slots_are_added_only_if_needed():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])
    ids = torch.ones(2, 4, dtype=torch.int64)
    for given, pooled in ((mask, False), (mask.flip(1), True)):
        packed, layout = unpad(ids, given, positions=4, pooled=pooled)
        assert (packed.sequences.capacity, packed.query_only, layout.has_padding_slots) == (5, 0, False)


def test_labels_of_padding_slots_do_not_count():
    layout = Layout.of(Sequences.from_lengths([2, 1], capacity=5), columns=2)
    assert layout.unpad(torch.tensor([[4, 5], [6, 7]]), "labels", fill=-100).tolist() == [4, 5, 6, -100, -100]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_bucket_changes_no_result(padding, train):
    model, _ = models(BY_NAME["model"], hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model.train(train)
    values, mask = inputs(BY_NAME["model"], padding), attended(padding)
    results = []
    for bucketed in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        packed, layout = unpad(
            values["input_ids"], mask, values["token_type_ids"], positions=16, training=train, bucketed=bucketed
        )
        hidden = bertfast.encoder.encode(model, packed)
        outputs = [layout.pad(hidden), model.pooler(hidden[packed.first][:, None])]
        sum(x.square().sum() for x in outputs).backward()
        results.append([*outputs, *(p.grad.clone() for p in model.parameters())])
    tokens = int(mask.sum())
    assert layout.has_padding_slots == (bucket(tokens) > tokens or packed.query_only > 0)
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_padded_batch_waits_for_the_device_once(padding, train, monkeypatch):
    copies = []
    values = inputs(BY_NAME["model"], padding)
    with Waits() as waits:
        unpad(values["input_ids"], values["attention_mask"], positions=16, training=train)
    assert waits.count == 0, "on a CPU the one copy to the host is no operation"
    monkeypatch.setattr(torch.Tensor, "tolist", counted(copies, torch.Tensor.tolist))
    unpad(values["input_ids"], values["attention_mask"], positions=16, training=train)
    assert len(copies) == 1


def test_fake_tensors_pass_through_a_packed_model():
    model = bertfast.BertForSequenceClassification(bertfast.BertConfig(**SIZES)).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(1, 20, dtype=torch.int64)
        cu_seqlens = torch.tensor([0, 7, 12], dtype=torch.int32)
        packed = encoder.pack(model, ids, cu_seqlens, max_length_q=8)
        logits = encoder.sequence_logits(model, packed)
        loss = encoder.sequence_classification_loss(model, packed, torch.zeros(2, dtype=torch.int64), 2)
    assert logits.shape == (2, model.config.num_labels)
    assert loss.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_whole_forward_is_traced_as_one_graph(packed):
    case = BY_NAME["model"]
    model, _ = models(case)
    values = inputs(case, "first")
    if packed:
        values = {"input_ids": values["input_ids"].flatten()[None], "cu_seq_lens_q": torch.tensor([0, 5, 11, 20])}
        values["max_length_q"] = 11
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, traced = model(**values), compiled(**values)
    torch.testing.assert_close(traced.pooler_output, expected.pooler_output)
    torch.testing.assert_close(traced.last_hidden_state, expected.last_hidden_state)
