"""`--config-overrides` and the flags of the initial model: what contradicts it is refused before any work, by name."""

import json

import pytest
from family_models import write_model
from runs import SIZES, settings_for

from bertfast.architectures import FAMILIES
from bertfast.models.families import architecture_of
from bertfast.models.files import read_config
from bertfast.training.initial_model import configure, initial_config, initial_model
from bertfast.training.pretraining import pretrain

TEXTS = ["the film was good", "a bad film it was", "what film", "a film was what it was"] * 10
has_modernbert = pytest.mark.skipif("modernbert" not in FAMILIES, reason="this transformers has another ModernBERT")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with models of several families."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("roberta", "modernbert", "nomic_bert", "eurobert"):
        if family in FAMILIES:
            write_model(family, folder / family, TEXTS)
    return folder


def config_of(overrides, architecture="bert", initial=None, dropout=None, max_positions=None):
    return initial_config(initial, "tiny", overrides, dropout, max_positions, architecture=architecture)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("roberta", "num_hidden_layers=1", "num_hidden_layers=1 contradicts the weights of .*roberta, whose num_hidd"),
        ("roberta", "num_attention_heads=1", "num_attention_heads=1 contradicts the weights of"),
        ("roberta", "max_position_embeddings=40", "max_position_embeddings must be at least 80, as .* got 40"),
        ("modernbert", "num_hidden_layers=1", "whose num_hidden_layers is 2: leave it out, or train from random"),
        ("modernbert", "norm_bias=true", "norm_bias=True contradicts the weights of"),
        ("nomic_bert", "num_hidden_layers=1", "num_hidden_layers=1 contradicts the weights of"),
        ("eurobert", "num_key_value_heads=2", "num_key_value_heads=2 contradicts the weights of"),
        ("roberta", "hidden_act=none", "hidden_act must name an activation"),
        ("modernbert", "local_attention=-4", "local_attention must be a whole number from 0 to 16777216, got -4"),
        (
            "modernbert",
            "classifier_pooling=none",
            "this is not the configuration of a modernbert: .*classifier_pooling",
        ),
    ],
)
def test_a_contradiction_of_a_checkpoint_names_the_override_and_not_its_file(family, overrides, message, models):
    if family not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    with pytest.raises(ValueError, match=f"^--config-overrides: .*{message}") as raised:
        config_of(overrides, initial=models / family)
    assert "config.json" not in str(raised.value)


def test_fewer_positions_than_a_checkpoint_has_are_refused(models):
    with pytest.raises(ValueError, match=r"^--max-positions must be at least 78, as .* got 40: .*--max-seq-length"):
        config_of("", initial=models / "roberta", max_positions=40)
    with pytest.raises(ValueError, match=r"^--max-positions: max_position_embeddings must be a whole number from 1"):
        config_of("", initial=models / "roberta", max_positions=2**30)


@has_modernbert
def test_what_weights_do_not_determine_may_be_changed(models):
    config = config_of(
        "num_hidden_layers=2,local_attention=4,max_position_embeddings=40", initial=models / "modernbert"
    )
    assert (config.local_attention, config.max_position_embeddings) == (4, 40)
    assert config.layer_types == read_config(models / "modernbert").layer_types
    initial_model(config, models / "modernbert")


@has_modernbert
@pytest.mark.parametrize("initial", [False, True])
def test_the_kinds_of_layers_follow_from_how_often_one_is_global(initial, models):
    changes = "global_attn_every_n_layers=1"
    if initial:
        config = config_of(changes, initial=models / "modernbert")
    else:
        config = config_of(f"{changes},num_hidden_layers=4", "modernbert")
    assert set(config.layer_types) == {"full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers == (2 if initial else 4)


@pytest.mark.parametrize(
    ("architecture", "overrides", "expected"),
    [
        ("modernbert", "attention_bias=true,mlp_bias=TRUE,decoder_bias=false", [True, True, False]),
        ("modernbert", "global_attn_every_n_layers=2", [2]),
        ("distilbert", "sinusoidal_pos_embds=true,hidden_size=64,n_heads=1", [True, None, 1]),
        ("electra", "summary_use_proj=false,classifier_dropout=0.5", [False, 0.5]),
        ("bert", "tie_word_embeddings=false,classifier_dropout=0.2", [False, 0.2]),
    ],
)
def test_options_of_a_family_are_taken(architecture, overrides, expected):
    if architecture not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    config = config_of(overrides, architecture)
    names = [entry.partition("=")[0] for entry in overrides.split(",")]
    found = [getattr(config, architecture_of(config).config_name(name)) for name in names]
    assert [x for x, y in zip(found, expected, strict=True) if y is not None] == [x for x in expected if x is not None]


@pytest.mark.parametrize(
    "overrides",
    [
        "attention_bias=true,mlp_bias=true,norm_bias=true",
        "decoder_bias=false,tie_word_embeddings=false",
        "global_attn_every_n_layers=1",
    ],
)
@has_modernbert
@pytest.mark.slow
def test_a_model_with_options_is_trained(overrides, corpus, tmp_path):
    changes = {"train_file": [str(corpus)], "processes": 1, "vocab_size": 320, "max_steps": 2}
    sizes = SIZES.replace("num_hidden_layers=1", "num_hidden_layers=2")
    pretrain(
        settings_for(tmp_path, None, architecture="modernbert", config_overrides=f"{sizes},{overrides}", **changes)
    )
    written = json.loads((tmp_path / "config.json").read_text())
    for entry in overrides.split(","):
        name, _, value = entry.partition("=")
        assert json.dumps(written[name]) == value


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("modernbert", "attention_bias=maybe", "attention_bias must be true or false, got 'maybe'"),
        ("modernbert", "layer_types=x", "layer_types would have no effect: global_attn_every_n_layers determines it"),
        ("modernbert", "rope_parameters=x", "rope_parameters would have no effect: --rope-theta determines it"),
        ("modernbert", "global_attn_every_n_layers=0", "global_attn_every_n_layers must be a whole number from 1"),
        ("modernbert", "attention_biass=true", "not a size or option of a modernbert .*; did you mean attention_bias?"),
        ("modernbert", "embedding_dropout=1.5", "embedding_dropout must be a number at least 0 and less than 1"),
        (
            "modernbert",
            "hidden_size=60,num_attention_heads=4",
            r"even head dimension, got 15 \(hidden_size 60, num_att",
        ),
        ("bert", "is_decoder=true", "is_decoder would have no effect: --objective determines it"),
        ("bert", "use_cache=true", "'use_cache' is not a size or option of a BERT configuration"),
        ("bert", "add_cross_attention=true", "'add_cross_attention' is not a size or option"),
        ("bert", "output_hidden_states=true", "'output_hidden_states' is not a size or option"),
        ("bert", "hidden_size=64,hidden_size=32", "hidden_size is given twice: leave one out"),
        ("distilbert", "hidden_size=64,dim=32", "dim is given twice: leave one out"),
        ("electra", "embedding_size=-1", "embedding_size must be a whole number from 1"),
    ],
)
def test_an_override_that_is_not_one_is_refused(architecture, overrides, message):
    if architecture not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    with pytest.raises(ValueError, match=f"^--config-overrides: .*{message}"):
        config_of(overrides, architecture)


@pytest.mark.parametrize("family", ["modernbert", "nomic_bert", "eurobert"])
def test_an_odd_head_dimension_in_a_checkpoint_is_refused_by_its_file(family, models, tmp_path):
    if family not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    entries = json.loads((models / family / "config.json").read_text())
    entries |= {"hidden_size": 30, "num_attention_heads": 2} | ({"head_dim": 15} if "head_dim" in entries else {})
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"config\.json: .*an even (head|rotary) dimension, .*got .*15"):
        read_config(tmp_path)


def test_heads_that_do_not_share_keys_evenly_are_refused(models, tmp_path):
    if "eurobert" not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    entries = json.loads((models / "eurobert" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"num_key_value_heads": 3}))
    with pytest.raises(ValueError, match=r"num_attention_heads must be a multiple of num_key_value_heads, got 2 and 3"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", ["roberta", "modernbert", "eurobert"])
def test_a_checkpoint_keeps_its_dropout_unless_another_is_given(family, models, tmp_path):
    if family not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    entries = json.loads((models / family / "config.json").read_text())
    adapter = architecture_of(read_config(models / family))
    names = [adapter.config_name(name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
    values = {name: value for name, value in zip(names, (0.25, 0.05), strict=True) if name in entries}
    (tmp_path / "config.json").write_text(json.dumps(entries | values))
    settings = settings_for(tmp_path / "run", None, init_from=str(tmp_path), config_overrides="")
    config = configure(settings, tmp_path)
    assert {name: getattr(config, name) for name in values} == values
    changed = configure(settings.replace(dropout=0.5), tmp_path)
    assert {name: getattr(changed, name) for name in values} == dict.fromkeys(values, 0.5)
    assert hasattr(changed, "hidden_dropout_prob") == ("hidden_dropout_prob" in entries)


def test_random_weights_have_a_dropout_by_default():
    assert config_of("").hidden_dropout_prob == config_of("").attention_probs_dropout_prob == 0.1
    assert config_of("", dropout=0.0).hidden_dropout_prob == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"second_phase_length": 64, "max_positions": 64, "config_overrides": "", "tokens_per_batch": 32},
            "--tokens-per-batch 32 cannot hold a sample of --second-phase-length 64: raise .*, or lower --second",
        ),
        ({"tokens_per_batch": 16}, "--tokens-per-batch 16 cannot hold a sample of --max-seq-length 24"),
        (
            {"gradient_accumulation_steps": 1, "batch_ramp": 0.5},
            "--gradient-accumulation-steps, which must be a multiple of 4, got 1: raise it, or pass --batch-ramp 0",
        ),
        (
            {"config_overrides": f"{SIZES},type_vocab_size=1", "objective": "mlm+nsp"},
            r"--objective mlm\+nsp requires a type_vocab_size of at least 2, .* is 1: use --objective mlm",
        ),
    ],
)
def test_a_contradiction_names_the_flag_to_change(changes, message, tmp_path):
    (tmp_path / "text.txt").write_text("A sentence.\n" * 20)
    with pytest.raises(ValueError, match=message):
        pretrain(settings_for(tmp_path / "run", None, **{"train_file": [str(tmp_path / "text.txt")]} | changes))
    assert not (tmp_path / "run" / "data").exists()
