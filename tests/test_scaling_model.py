"""The page's predictions of scaling are those of the program, and the program computes what it says."""

import math

import pytest
import torch

from bench.end_to_end import scaling_model
from bench.end_to_end.scaling_model import (
    BUCKET,
    NETWORKS,
    NVLINK,
    Model,
    all_reduce_s,
    buckets_of,
    gather_s,
    memory_of,
    sent_gb,
    sharded_step_s,
    share_of,
    step_s,
)
from bertfast import BertForPreTraining, preset_config

BASE = Model.of("base")
TINY = Model(parameters=20 << 20, of_layer=BUCKET // 4, layers=2, layer_s=1.0, head_s=0.5)
SLOW = 1e9  # bytes/s between nodes


def test_the_page_is_what_the_program_gives():
    page = scaling_model.PAGE.read_text(encoding="utf-8")
    assert scaling_model.updated(page) == page, "run `python -m bench.end_to_end.scaling_model`"


def test_a_page_without_the_comments_is_refused():
    with pytest.raises(ValueError, match=r"docs/SCALING\.md lacks <!-- "):
        scaling_model.updated("# Several processes")


def test_a_page_that_is_not_that_of_the_program_fails_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling_model, "PAGE", tmp_path / "SCALING.md")
    scaling_model.PAGE.write_text(f"before\n{scaling_model.BEGIN}\n1 GPU\n{scaling_model.END}\nafter\n")
    with pytest.raises(SystemExit, match=r"run `python -m bench\.end_to_end\.scaling_model`"):
        scaling_model.main(["--check"])
    scaling_model.main([])
    scaling_model.main(["--check"])
    text = scaling_model.PAGE.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_parameters_and_the_memory_are_those_of_the_model():
    model = BertForPreTraining(preset_config("base"))
    assert BASE.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert BASE.of_layer == sum(parameter.numel() for parameter in model.bert.encoder.layer[0].parameters())
    whole, part = memory_of("base", 1024, 1), memory_of("base", 1024, 8)
    assert whole.fixed == pytest.approx(16 * BASE.parameters)
    assert part.fixed == pytest.approx(whole.fixed / 8, rel=1e-6)
    assert part.total - part.fixed == whole.total - whole.fixed


def test_a_forward_pass_is_that_of_the_published_flop_count():
    # Base, 128 tokens: 2 x 85 M weights and 4 x 12 x 768 x 128 of attention per token; 15 % of them need the head.
    encoder = 2 * 84_934_656 + 4 * 12 * 768 * 128
    head = 2 * 768 * (768 + 30_522) * 19 / 128
    assert BASE.forward_s(1) * 0.6 * 790e12 == pytest.approx(encoder + head, rel=1e-6)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_in_a_node_a_sum_takes_the_time_of_its_bytes_over_nvlink(gpus):
    size = 1e9
    seconds = all_reduce_s(size, gpus, SLOW) - 20e-6
    assert seconds == pytest.approx(2 * size * (gpus - 1) / gpus / (0.8 * NVLINK))
    assert seconds == pytest.approx(sent_gb(Model(int(size / 4), 0, 0, 0, 0), gpus, 8) * 1e9 / (0.8 * NVLINK))


def test_between_nodes_each_gpu_sends_an_eighth_over_the_network():
    within = gather_s(8e9, 8, SLOW)
    between = gather_s(8e9, 32, SLOW) - within
    assert between == pytest.approx(1e9 * 3 / 4 / (0.8 * SLOW) + 2 * 5e-6)


def test_one_gpu_does_not_communicate():
    assert gather_s(1e9, 1, SLOW) == all_reduce_s(1e9, 1, SLOW) == 0
    assert step_s(BASE, 1000, 2, 1, SLOW) == pytest.approx(6 * BASE.forward_s(1000) + BASE.update_s())
    assert sharded_step_s(BASE, 1000, 2, 1, SLOW) == pytest.approx(6 * BASE.forward_s(1000) + BASE.update_s())


def test_buckets_are_ready_after_their_layers_and_those_of_the_embeddings_last():
    buckets = buckets_of(TINY, tokens=1)
    assert sum(size for _, size in buckets) == 4 * TINY.parameters
    # Forward 2.5 s, backward of the head 1 s, of each layer 2 s.
    assert [ready for ready, _ in buckets] == [5.5, 7.5, 7.5, 7.5]
    assert buckets[-1][1] == 4 * TINY.parameters - 3 * BUCKET


def test_buckets_are_sent_one_after_the_other_while_the_backward_pass_goes_on():
    costs = [all_reduce_s(size, 16, SLOW) for _, size in buckets_of(TINY, 1)]
    late = sum(costs[1:])  # ready when the backward pass ends, at 7.5 s
    assert step_s(TINY, 1, 1, 16, SLOW) == pytest.approx(7.5 + late + TINY.update_s())
    slower = SLOW / 1000
    costs = [all_reduce_s(size, 16, slower) for _, size in buckets_of(TINY, 1)]
    assert costs[0] > 2  # longer than the layer that is computed meanwhile
    assert step_s(TINY, 1, 1, 16, slower) == pytest.approx(5.5 + sum(costs) + TINY.update_s())
    assert step_s(TINY, 1, 3, 16, SLOW) - step_s(TINY, 1, 1, 16, SLOW) == pytest.approx(15)


def test_sharding_waits_for_the_longer_of_a_layer_and_its_parameters():
    layer, rest = gather_s(4 * TINY.of_layer, 16, SLOW), gather_s(4 * (TINY.parameters - 2 * TINY.of_layer), 16, SLOW)
    assert layer < 1
    computed = 7.5 + 2 * rest + layer
    assert sharded_step_s(TINY, 1, 1, 16, SLOW) == pytest.approx(computed + TINY.update_s(16))
    slower = SLOW / 1e6
    layer, rest = (
        gather_s(size, 16, slower) for size in (4 * TINY.of_layer, 4 * (TINY.parameters - 2 * TINY.of_layer))
    )
    # Two gathers in the forward pass, then the last layer; two gathers and two sums in the backward pass; the head.
    expected = 2 * rest + 2 * layer + 1 + 4 * layer + 1.5
    assert sharded_step_s(TINY, 1, 1, 16, slower) == pytest.approx(expected + TINY.update_s(16), rel=1e-6)


@pytest.mark.parametrize("network", NETWORKS.values())
@pytest.mark.parametrize("function", [step_s, sharded_step_s])
def test_more_gpus_and_slower_networks_never_shorten_a_step_of_the_same_work(function, network):
    times = [function(BASE, 32_768, 1, gpus, network) for gpus in scaling_model.GPUS]
    update = [BASE.update_s(1 if function is step_s else gpus) for gpus in scaling_model.GPUS]
    times = [seconds - part for seconds, part in zip(times, update, strict=True)]
    assert times == sorted(times)
    assert function(BASE, 32_768, 1, 512, network) >= function(BASE, 32_768, 1, 512, math.inf)


@pytest.mark.parametrize("gpus", scaling_model.GPUS)
def test_a_step_has_the_same_tokens_on_any_number_of_gpus(gpus):
    tokens, passes = share_of(gpus, same_batch=True)
    assert gpus * tokens * passes == 1 << 20
    assert tokens <= 32_768
    assert share_of(gpus, same_batch=False) == (32_768, 1)


def test_tables_have_a_row_per_number_of_gpus_and_efficiencies_up_to_1():
    for same_batch in (False, True):
        rows = scaling_model.rows_of("base", same_batch)
        assert [int(row[0]) for row in rows] == list(scaling_model.GPUS)
        shares = [int(cell.split("(")[1].strip("%)")) for row in rows for cell in row[2:4]]
        assert max(shares) == 100
        assert shares[0] == shares[1] == 100
        assert min(shares) > 0


def test_meta_tensors_are_counted_once_if_they_are_tied():
    with torch.device("meta"):
        model = BertForPreTraining(preset_config("tiny"))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
