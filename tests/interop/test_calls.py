"""Calls of a patched model with all kinds of arguments give what transformers gives."""

import pytest
import torch
import transformers
from live_models import VALUES, batch, live, outputs_of, pair, watch, watch_layer
from parity import SIZES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


def test_attention_weights_come_from_transformers_own_code():
    model = live(attn_implementation="eager")
    expected = outputs_of(model, output_attentions=True).attentions
    bertfast.patch(model)
    got = outputs_of(model, output_attentions=True).attentions
    assert all(map(torch.equal, got, expected))


def test_a_causal_model_generates_the_same_with_its_cache():
    model = live("BertLMHeadModel", is_decoder=True, max_position_embeddings=32)
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.arange(3, 9).view(2, 3), **ask)
    bertfast.patch(model)
    assert torch.equal(model.generate(torch.arange(3, 9).view(2, 3), **ask), expected)


@pytest.mark.parametrize("shape", [(3, 11, 11), (3, 1, 11, 11)])
def test_a_mask_between_pairs_of_tokens_runs_transformers_own_code(shape):
    model = live(attn_implementation="eager")
    mask = torch.rand(shape) > 0.3
    values = {
        "input_ids": batch()["input_ids"],
        "attention_mask": mask if len(shape) == 3 else (mask.float() - 1) * 1e9,
    }
    try:
        expected = model(**values).logits
    except Exception as error:  # versions accept different masks
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    bertfast.patch(model)
    assert torch.equal(model(**values).logits, expected)


@pytest.mark.parametrize("rows", [1, None], ids=["[1, T]", "[T]"])
@pytest.mark.parametrize("change", [None, watch, watch_layer])
def test_packed_sequences_do_not_mix(change, rows):
    model = live("BertModel", seed=3)
    if change is not None:
        holder = nn.Module()
        holder.bert = model
        change(holder)
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text) for text in texts]
    bertfast.patch(model)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])
    packed = model(
        torch.cat(texts, 1),
        position_ids=positions if rows is None else positions[None],
        cu_seq_lens_q=torch.tensor([0, 4, 5, 12], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 4, 5, 12], dtype=torch.int32),
        max_length_q=7,
        max_length_k=7,
    )
    expected = torch.cat([one.last_hidden_state for one in alone], 1)
    torch.testing.assert_close(packed.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        packed.pooler_output, torch.cat([one.pooler_output for one in alone]), rtol=1e-4, atol=1e-5
    )


def test_packed_input_is_refused_where_transformers_would_mix_sequences():
    model = live("BertModel")
    bertfast.patch(model)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass it padded"):
        model(torch.arange(5)[None], cu_seq_lens_q=starts, output_attentions=True)


@pytest.mark.parametrize("name", ["BertForNextSentencePrediction", "BertForTokenClassification", "BertLMHeadModel"])
def test_packed_sequences_of_a_head_do_not_mix(name):
    """Before version 5 these heads of transformers drop or refuse `cu_seq_lens_q`."""
    model = live(name, is_decoder=name == "BertLMHeadModel", use_cache=False)
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text).logits for text in texts]
    bertfast.patch(model)
    packed = model(torch.cat(texts, 1), cu_seq_lens_q=torch.tensor([0, 4, 5, 12]), max_length_q=7).logits
    expected = torch.cat(alone, 0 if name == "BertForNextSentencePrediction" else 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


def test_input_embeddings_and_position_ids_are_read():
    model = live()
    words = model.get_input_embeddings()(batch()["input_ids"]).detach()
    positions = torch.arange(11).flip(0)[None]
    values = {"inputs_embeds": words, "attention_mask": batch()["attention_mask"], "position_ids": positions}
    expected = model(**values).logits
    bertfast.patch(model)
    torch.testing.assert_close(model(**values).logits, expected, rtol=1e-4, atol=1e-5)
    arguments = (batch()["input_ids"], batch()["attention_mask"], batch()["token_type_ids"])
    assert isinstance(model.bert(*arguments, return_dict=False), tuple)


def test_packed_input_whose_keys_are_other_sequences_is_refused():
    model = bertfast.BertModel(transformers.BertConfig(**SIZES)).eval()
    ids, starts = torch.tensor([[2, 5, 3, 2, 6, 3]]), torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="cu_seq_lens_k without cu_seq_lens_q: pass both"):
        model(ids, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="a cu_seq_lens_k other than its cu_seq_lens_q: pass the same for both"):
        model(ids, cu_seq_lens_q=starts, cu_seq_lens_k=torch.tensor([0, 2, 6]))


def test_shapes_that_broadcast_in_transformers_are_taken():
    patched, plain = pair()
    ids, types = VALUES["input_ids"], VALUES["token_type_ids"]
    row = torch.tensor([[1] * 8 + [0] * 3])
    positions, compared = torch.arange(11).flip(0), 0
    for arguments in (
        {"attention_mask": row},
        {"position_ids": positions[None]},
        {"position_ids": positions},
        {"position_ids": torch.tensor([[1], [3], [2]])},
        {"position_ids": torch.tensor([[3]])},
        {"position_ids": torch.tensor([3])},
        {"token_type_ids": types[:1]},
        {"token_type_ids": types[0]},
        {"token_type_ids": torch.tensor([[1], [0], [1]])},
        {"token_type_ids": torch.tensor([[1]])},
        {"token_type_ids": torch.tensor(1)},
        {"attention_mask": torch.cat([VALUES["attention_mask"], torch.ones(3, 4)], 1)},
        {"attention_mask": VALUES["attention_mask"][:, :9]},
        {"attention_mask": VALUES["attention_mask"].bool()},
        {"attention_mask": VALUES["attention_mask"].float()},
    ):
        arguments = {"input_ids": ids, "token_type_ids": types} | arguments
        try:
            expected = plain(**arguments).logits
        except (IndexError, RuntimeError):  # some versions refuse some of them
            with pytest.raises((IndexError, RuntimeError)):
                patched(**arguments)
            continue
        torch.testing.assert_close(patched(**arguments).logits, expected, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_pooled_output_of_a_row_of_padding_is_that_of_transformers(attention):
    patched, plain = pair(attn_implementation=attention)
    mask = VALUES["attention_mask"].clone()
    mask[1] = 0
    expected = plain(VALUES["input_ids"], mask).logits
    torch.testing.assert_close(patched(VALUES["input_ids"], mask).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_choice_of_hidden_states_by_index_is_kept():
    patched, plain = pair()
    try:
        expected = plain(**VALUES, output_hidden_states=0).hidden_states
    except Exception as error:  # some versions do not have it
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    got = patched(**VALUES, output_hidden_states=0).hidden_states
    assert (got is None) == (expected is None)
    for fused, hf in zip(got or (), expected or (), strict=True):
        assert (fused is None) == (hf is None)


def test_torch_func_differentiates_what_transformers_computes():
    patched, plain = pair(num_hidden_layers=1)
    labels = torch.tensor([0, 1, 2])

    def gradients(model):
        parameters = dict(model.named_parameters())
        arguments = {**VALUES, "labels": labels}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (), arguments).loss)(parameters)

    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(patched)[name], gradient, rtol=1e-4, atol=1e-6)


def test_tensors_without_values_have_the_shapes_of_transformers():
    patched, plain = pair()
    ids = VALUES["input_ids"]
    try:
        expected = plain.to("meta")(ids.to("meta")).logits.shape
    except RuntimeError as error:  # some versions refuse them
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    assert patched.to("meta")(ids.to("meta")).logits.shape == expected
    with FakeTensorMode():
        fake = live()
        bertfast.patch(fake)
        assert fake(torch.zeros(3, 11, dtype=torch.int64)).logits.shape == (3, 3)


def test_hooks_for_all_modules_are_called_as_often():
    patched, plain = pair()
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        plain(**VALUES)
        expected = len(calls)
        patched(**VALUES)
    finally:
        handle.remove()
    assert calls[:expected] == calls[expected:]


def test_an_argument_given_twice_is_refused():
    model, _ = pair()
    with pytest.raises(TypeError, match=r"multiple values for .*argument 'input_ids'"):
        model.bert(VALUES["input_ids"], input_ids=VALUES["input_ids"])
