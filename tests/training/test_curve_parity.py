"""The loss curve of a small ModernBERT is that of a plain loop around transformers on the same batches."""

import copy

import pytest
import transformers
from runs import settings_for

from bench.end_to_end.curve_parity import TOLERANCE, TOLERANCE_OF_MEANS, losses_of, mean, plain_losses
from bertfast.architectures import FAMILIES
from bertfast.data.samples import Sampling
from bertfast.training.pretraining import Pretraining

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("modernbert" not in FAMILIES, reason="bertfast fuses ModernBERT of transformers 5"),
]

# Two layers without a window and two with one, of 8 tokens on each side, which most of the sequences exceed.
SIZES = "num_hidden_layers=4,hidden_size=128,num_attention_heads=2,intermediate_size=192,local_attention=16"
COMPARED, SMOOTHED = 50, 50  # steps whose losses are compared one by one, and last steps whose mean is


@pytest.mark.filterwarnings("ignore")  # of transformers, about the tokens that a row ends with
@pytest.mark.parametrize("steps", [20, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_a_modernbert_has_the_losses_of_a_plain_loop_around_transformers(steps, corpus, tmp_path):
    settings = settings_for(
        tmp_path / "run",
        None,
        train_file=[str(corpus)],
        validation_split_percentage=20,
        processes=1,
        vocab_size=512,
        architecture="modernbert",
        config_overrides=SIZES,
        sampling=Sampling(max_seq_length=64, mlm_probability=0.3),
        tokens_per_batch=1024,
        gradient_accumulation_steps=1,
        max_steps=steps,
        optimizer="adamw",
        learning_rate=1e-3,
        warmup_ratio=0.1,
        dropout=0.0,
        save_steps=1000,
        eval_steps=1000,
        eval_batches=1,
    )
    run = Pretraining(settings)
    hf = transformers.ModernBertForMaskedLM(copy.deepcopy(run.model.config))
    hf.load_state_dict(run.model.state_dict())
    found, expected = losses_of(run), plain_losses(hf, settings, run.plan.batches)
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    print(f"losses differ by at most {max(differences):.1e}, in the first steps by {max(differences[:COMPARED]):.1e}")
    assert max(differences[:COMPARED]) <= TOLERANCE
    assert abs(mean(found[-SMOOTHED:]) - mean(expected[-SMOOTHED:])) <= TOLERANCE_OF_MEANS
    assert expected[-1] < expected[0] - 1  # it learns
