"""Lower bounds count real tokens, the weights of each batch and the optimizer, at the measured rates."""

import pytest
import torch

from bench import ceilings
from bench.bounds import ADAMW_BYTES, Rates, step_bound
from bench.ceilings import inference_gemm_throughput, layer_gemms
from bertfast import preset_config
from bertfast.training.flops import encoder_flops, encoder_parameters

CONFIG = preset_config("tiny")


def test_many_tokens_are_bound_by_flops_and_few_by_reading_the_weights():
    weights = encoder_parameters(CONFIG)
    rates = Rates(flops=1e9, bytes=1e9)
    lengths = [128] * 16
    assert rates.inference(CONFIG, [lengths]) == encoder_flops(CONFIG, lengths) / 1e9
    assert rates.inference(CONFIG, [[1], [1]]) == 2 * 4 * weights / 1e9
    assert rates.inference(CONFIG, [[1], [1]], weight_bytes=2) == encoder_flops(CONFIG, [1, 1]) / 1e9


def test_a_training_step_takes_three_forward_passes_and_the_traffic_of_the_optimizer():
    rates, lengths = Rates(flops=2.0, bytes=4.0), [7, 9]
    gradients = 3 * encoder_flops(CONFIG, lengths) / 2
    assert rates.training(CONFIG, lengths) == gradients
    assert rates.training(CONFIG, lengths, parameters=10) == gradients + 10 * ADAMW_BYTES / 4
    older = {"lower_bound_s": 2.0, "optimizer_s": 0.4}
    assert step_bound(older) == 2.0
    assert step_bound(older | {"copy_gb_per_s": 1.0, "optimizer_lower_bound_s": 0.25}) == 2.25
    assert step_bound(older | {"copy_gb_per_s": 1.0, "optimizer_lower_bound_s": 0.5}) == 2.4


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_the_gemms_of_a_layer_have_the_flops_of_its_weights(architecture):
    config = preset_config("tiny", architecture=architecture)
    flops = config.num_hidden_layers * sum(2 * m * k * n for m, k, n in layer_gemms(config, 5))
    assert flops == 2 * 5 * encoder_parameters(config)


def test_rates_are_those_of_this_machine():
    rates = Rates.measured(CONFIG, 16, torch.float32, training=True)
    assert 1e6 < rates.flops < 1e16
    assert 1e6 < rates.bytes < 1e14
    assert rates.entries() == {"gemm_gflops": rates.flops / 1e9, "copy_gb_per_s": rates.bytes / 1e9}


def test_the_gemm_rate_of_inference_is_that_of_the_faster_kernels(monkeypatch):
    """PyTorch's, or those with packed weights; a bound at the rate of the slower ones would be no bound."""
    for library, is_faster in ((1.0, False), (1e18, True)):
        monkeypatch.setattr(ceilings, "gemm_throughput", lambda *_, library=library: library)
        found = inference_gemm_throughput([(16, 64, 64)], torch.float32)
        assert found >= library
        assert (found == library) == is_faster
