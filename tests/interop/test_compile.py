"""`torch.compile` traces the packed path of a patched model."""

import pytest
import torch
from live_models import batch, live
from parity import CASES, PADDINGS, inputs
from torch._dynamo.testing import CompileCounterWithBackend

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


COMPILED = {
    "BertForSequenceClassification": "sequence",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "pretraining",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_at_most_twice_for_all_shapes(name, train):
    model = live(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(train)
    bertfast.patch(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    case = next(case for case in CASES if case.name == COMPILED[name])
    for rows, columns, padding in (
        (2, 5, "right"),
        (3, 8, "first"),
        (3, 11, "inside"),
        (2, 3, "left"),
        (3, 10, "first"),
    ):
        values = inputs(case, padding).items()
        values = {key: x[:rows, :columns].contiguous() if x.dim() == 2 else x[:rows] for key, x in values}
        results = []
        for one in (compiled, model):
            model.zero_grad()
            outputs = one(**values)
            outputs.loss.backward()
            found = {key: x.detach() for key, x in outputs.items()}
            results.append(found | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-6, msg=f"{key}: {{}}".format)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_with_graph_breaks_gives_the_same():
    model = live()
    bertfast.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for padding in PADDINGS:
            values = batch(padding)
            torch.testing.assert_close(compiled(**values).logits, model(**values).logits)
