"""A step that is recorded and replayed, by a recorder that does on a CPU what a CUDA graph does.

It keeps every operation that is launched, with the very tensors it was given, and launches them again in their order;
what the host decided meanwhile is forgotten. Asking a tensor for its value is an error, as it is while a GPU records.
"""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from runs import assert_same_weights, entries, losses, settings_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bertfast.data.samples import Sampling
from bertfast.training import pretrain as program
from bertfast.training import step as train_step
from bertfast.training.pretrain import Pretraining, pretrain
from bertfast.training.step import TrainStep

aten = torch.ops.aten
ASKS_THE_DEVICE = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select)


class Recording(TorchDispatchMode):
    """Runs operations and keeps them."""

    def __init__(self):
        super().__init__()
        self.launches, self.ran = [], False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in ASKS_THE_DEVICE:
            raise RuntimeError(f"{operation} waits for the device, which is recording")
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and id(leaf) not in given]
        is_view = any(argument.alias_info is not None for argument in operation._schema.returns)
        if not is_view or operation._schema.is_mutable:
            self.launches.append((operation, args, kwargs, made))
        return result

    def replay(self) -> None:
        if not self.ran:  # it ran while it was recorded, as with CUDA it does not
            self.ran = True
            return
        with torch.no_grad():
            for operation, args, kwargs, made in self.launches:
                result = operation(*args, **kwargs)
                new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for old, value in zip(made, new if made else [], strict=False):
                    old.copy_(value)


def emulated_graph(function):
    recording = Recording()
    with recording:
        result = function()
    return result, recording.replay


SIZES = "num_hidden_layers=1,hidden_size=32,num_attention_heads=1,intermediate_size=64,max_position_embeddings=32"
SHORT = {
    "config_overrides": SIZES,
    "max_steps": 12,
    "save_steps": 4,
    "gradient_accumulation_steps": 4,
    "eval_batches": 2,
}
KINDS = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "lamb, recomputed": {"optimizer": "lamb", "checkpoint_layers": 1},
    "a scaled loss": {"optimizer": "adamw", "precision": "fp16"},
    "bf16, no pairs": {"precision": "bf16", "sampling": Sampling(max_seq_length=24, objective="mlm")},
    "ramp, two phases": {
        "sampling": Sampling(max_seq_length=12),
        "batch_ramp": 0.5,
        "second_phase_length": 24,
        "second_phase_share": 0.5,
    },
}


def replay_steps(monkeypatch) -> list:
    """Make runs replay all steps but the first few; what they record is listed."""
    recorded = []

    def record(function):
        recorded.append(function)
        return emulated_graph(function)

    def recording(*arguments, **options):
        return TrainStep(*arguments, **options | {"record": record})

    monkeypatch.setattr(program, "TrainStep", recording)
    return recorded


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_step_to_the_last_bit(kind, data, tmp_path, monkeypatch):
    if kind == "a scaled loss":  # with products in fp32: in fp16 a CPU has no kernels
        monkeypatch.setattr(train_step, "autocast", lambda *precision: nullcontext())
    settings = settings_for(tmp_path / "eager", data, **SHORT | KINDS[kind])
    pretrain(settings)
    recorded = replay_steps(monkeypatch)
    pretrain(dataclasses.replace(settings, output_dir=str(tmp_path / "replayed")))
    assert len(recorded) == (3 if settings.second_phase_length else 2)
    assert losses(tmp_path / "eager") == losses(tmp_path / "replayed")
    assert_same_weights(tmp_path / "eager", tmp_path / "replayed")


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_a_step_that_is_not_finite_moves_nothing(optimizer, replayed, data, tmp_path, monkeypatch):
    """The second step and the seventh."""
    if replayed:
        replay_steps(monkeypatch)
    run = Pretraining(settings_for(tmp_path, data, **SHORT, optimizer=optimizer, warmup_ratio=0))
    gradients, update, moved = run.train_step.gradients, run.train_step.update, []

    def what_moves() -> list[torch.Tensor]:
        states = [state for each in run.train_step.optimizers for state in each.state_dict()["state"].values()]
        return [x.clone() for x in (*run.model.parameters(), *(x for state in states for x in state.values()))]

    def poisoned(*arguments):
        sums = gradients(*arguments)
        if run.step in (1, 6):
            run.model.bert.embeddings.word_embeddings.weight.grad[3, 3] = torch.inf
        return sums

    def watched(rate):
        before, norm = what_moves(), update(rate)
        moved.append(not all(map(torch.equal, before, what_moves())))
        return norm

    run.train_step.gradients, run.train_step.update = poisoned, watched
    run.run(lambda step: None)
    assert moved == [True, False, True, True, True, True, False] + 5 * [True]
    assert [entry["step"] for entry in entries(tmp_path) if "skipped" in entry] == [2, 7]


def test_what_only_the_host_knows_is_not_asked_for_while_a_step_is_recorded(data, tmp_path, monkeypatch):
    """Else it would stand in the graph for all batches: as it would with heads that no kernel takes."""
    replay_steps(monkeypatch)
    sizes = SIZES.replace("num_attention_heads=1", "num_attention_heads=2")
    with pytest.raises(RuntimeError, match="asked for the lengths of this one"):
        pretrain(settings_for(tmp_path, data, **SHORT | {"config_overrides": sizes}))


def test_steps_are_read_together_where_the_device_is_not_waited_for(data, tmp_path):
    """As on a GPU: the same entries as when each is read at once."""
    for name, unread in (("each", 1), ("together", 5)):
        run = Pretraining(settings_for(tmp_path / name, data, **SHORT))
        run.steps_unread = unread
        run.run(lambda step: None)
    assert losses(tmp_path / "each") == losses(tmp_path / "together")
    assert [entry["step"] for entry in entries(tmp_path / "together") if "tflops" in entry] == list(range(1, 13))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no CUDA graphs")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_is_the_step_to_the_last_bit(kind, data, tmp_path):
    settings = settings_for(tmp_path / "eager", data, **SHORT | KINDS[kind] | {"device": "cuda", "cuda_graph": False})
    pretrain(settings)
    replayed = dataclasses.replace(settings, output_dir=str(tmp_path / "replayed"), cuda_graph=True)
    pretrain(replayed)
    assert losses(tmp_path / "eager") == losses(tmp_path / "replayed")
    assert_same_weights(tmp_path / "eager", tmp_path / "replayed")
