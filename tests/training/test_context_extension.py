"""Context extension: the base of rotary positions grows with the sequences, in transformers' configuration too."""

import signal

import pytest
import torch
import transformers
from family_models import FamilyCase, plain, write_model
from runs import SIZES, assert_same_weights, settings_for

from bertfast.architectures import FAMILIES, family
from bertfast.architectures.rope_theta import set_rope_theta
from bertfast.cli.flags import parse
from bertfast.cli.recipes import find_config
from bertfast.runtime.signals import RunStopped
from bertfast.training.pretraining import Pretraining, PretrainSettings, pretrain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("modernbert" not in FAMILIES, reason="bertfast fuses ModernBERT of transformers 5"),
]

STEPS, FIRST, SECOND = 6, 500.0, 9000.0
TEXTS = ["the film was good", "a bad film it was", "what film", "a film was what it was"] * 10


def extension(folder, corpus, **changes):
    """Return the settings of a run whose last three steps have longer sequences and a larger base."""
    values = {
        "train_file": [str(corpus)],
        "validation_split_percentage": 20,
        "processes": 1,
        "vocab_size": 320,
        "architecture": "modernbert",
        "config_overrides": SIZES.replace("num_hidden_layers=1", "num_hidden_layers=2"),
        "dropout": 0.0,
        "max_seq_length": 12,
        "second_phase_length": 24,
        "second_phase_share": 0.5,
        "rope_theta": FIRST,
        "second_phase_rope_theta": SECOND,
        "max_steps": STEPS,
        "save_steps": 2,
    }
    settings = settings_for(folder, None, max_steps=STEPS)
    return settings.replace(sampling=settings.sampling.replace(max_seq_length=12)).replace(**values | changes)


def bases(config):
    """Return the bases of layers without a window, and of layers with one."""
    return tuple(config.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))


def test_the_second_phase_has_its_own_base_and_transformers_reads_it(corpus, tmp_path):
    run, found = Pretraining(extension(tmp_path / "run", corpus)), []
    expected = {}
    for theta in (FIRST, SECOND):
        parameters = {kind: {"rope_type": "default", "rope_theta": theta} for kind in run.model.config.rope_parameters}
        config = transformers.ModernBertConfig(**run.model.config.to_dict() | {"rope_parameters": parameters})
        expected[theta] = transformers.ModernBertModel(config).rotary_emb.full_attention_inv_freq
    encoder = run.model.base_model
    local = encoder.rotary_emb.sliding_attention_inv_freq.clone()
    address = encoder.rotary_emb.full_attention_inv_freq.data_ptr()
    take = run._take_batches

    def taken():
        counts = take()
        found.append(encoder.rotary_emb.full_attention_inv_freq.clone())
        return counts

    run._take_batches = taken
    run.run(lambda step: None)
    for step, frequencies in enumerate(found):
        torch.testing.assert_close(frequencies, expected[FIRST if step < STEPS // 2 else SECOND])
    assert torch.equal(encoder.rotary_emb.sliding_attention_inv_freq, local)
    assert encoder.rotary_emb.full_attention_inv_freq.data_ptr() == address  # which a CUDA graph would read
    hf = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "run")
    assert bases(hf.config) == (SECOND, 10_000.0)
    torch.testing.assert_close(hf.model.rotary_emb.full_attention_inv_freq, expected[SECOND])


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_stops_in_either_phase_resumes_bitwise_identically(stop, corpus, tmp_path):
    pretrain(extension(tmp_path / "once", corpus))
    settings = extension(tmp_path / "twice", corpus)
    with pytest.raises(RunStopped):
        pretrain(settings, lambda done: signal.raise_signal(signal.SIGINT) if done == stop else None)
    pretrain(settings.replace(resume=True))
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("once", "twice")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["modernbert", "eurobert"])
def test_the_base_of_a_checkpoint_is_changed(name, tmp_path):
    if name not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    model = write_model(name, tmp_path / "model", TEXTS)
    (tmp_path / "text.txt").write_text("\n\n".join(["\n".join(TEXTS)] * 8))
    pretrain(
        PretrainSettings.of(
            output_dir=str(tmp_path / "out"), init_from=str(model), train_file=[str(tmp_path / "text.txt")],
            processes=1, max_steps=1, max_seq_length=24, tokens_per_batch=128, max_positions=100, rope_theta=SECOND,
            precision="fp32", device="cpu",
        )
    )  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    parameters = config.rope_parameters
    assert parameters.get("full_attention", parameters)["rope_theta"] == SECOND
    assert config.max_position_embeddings == 100


@pytest.mark.parametrize("name", ["modernbert", "nomic_bert", "eurobert"])
def test_a_changed_base_gives_the_outputs_of_a_model_that_was_made_with_it(name):
    if name not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    changed = plain(FamilyCase(name, "Model"))
    set_rope_theta(family(name), changed, SECOND)
    made = type(changed)(changed.config).eval()
    made.load_state_dict(changed.state_dict())
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        outputs = [model(ids).last_hidden_state for model in (changed, made, plain(FamilyCase(name, "Model")))]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_the_recipe_has_the_bases_of_the_paper():
    settings = parse(
        "pretrain", PretrainSettings, ["--config", str(find_config("modern")), "--output-dir", "somewhere"]
    )
    assert (settings.model.rope_theta, settings.batch.second_phase_rope_theta) == (10_000, 160_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "roberta"},
            "--rope-theta and --second-phase-rope-theta would have no effect: a roberta model has no rotary positions",
        ),
        ({"second_phase_length": 0}, "--second-phase-rope-theta .*would have no effect: there is no --second-phase-le"),
        ({"rope_theta": 0.0}, "--rope-theta must be more than 0, got 0"),
    ],
)
def test_a_base_without_effect_is_refused(changes, message, corpus, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain(extension(tmp_path, corpus, **changes))
