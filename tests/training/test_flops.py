"""The FLOPs of an encoder count the pairs of positions that attend to each other."""

import pytest

from bertfast.architectures import FAMILIES
from bertfast.architectures.presets import preset_config
from bertfast.training.flops import encoder_flops, encoder_parameters, training_flops

LENGTHS = (3, 9, 40)


def pairs(length, window):
    return sum(abs(i - j) <= window for i in range(length) for j in range(length))


@pytest.mark.skipif("modernbert" not in FAMILIES, reason="this transformers has another ModernBERT, or none")
def test_windows_count_the_positions_inside_them():
    config = preset_config("tiny", architecture="modernbert", local_attention=8)
    assert config.layer_types[:3] == ["full_attention", "sliding_attention", "sliding_attention"]
    windows = [100 if kind == "full_attention" else 4 for kind in config.layer_types]
    attended = sum(pairs(length, window) for window in windows for length in LENGTHS)
    expected = 2 * encoder_parameters(config) * sum(LENGTHS) + 4 * config.hidden_size * attended
    assert encoder_flops(config, LENGTHS) == expected


def test_the_weights_of_bert_base_are_those_of_its_layers():
    assert encoder_parameters(preset_config("base")) == 12 * 768 * (4 * 768 + 2 * 3072)


def test_training_takes_three_forward_passes_of_encoder_and_head():
    config = preset_config("base")
    head = 2 * 768 * (768 + 30_522) * 5
    assert training_flops(config, LENGTHS, masked=5) == 3 * (encoder_flops(config, LENGTHS) + head)
