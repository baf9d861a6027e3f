"""Steps and passes that are captured and replayed, by a class that does on a CPU what a CUDA graph does.

It keeps every operation that is launched, with the very tensors it was given, and launches them again in their order;
what the host decided meanwhile is forgotten. Asking a tensor for its value is an error, as it is while a GPU captures.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from runs import assert_same_weights, entries, losses, settings_for
from sentiment import FILLERS
from task_examples import settings_for as finetuning_settings
from task_examples import write_examples
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bertfast import BertModel
from bertfast.data.samples import Sampling
from bertfast.data.tokenizer import load_tokenizer
from bertfast.encoder import unpadding
from bertfast.inference import embed as embedding
from bertfast.inference import predict as prediction
from bertfast.ops import sequences
from bertfast.ops.sequences import Sequences
from bertfast.runtime import cuda_graph
from bertfast.runtime.cuda_graph import WARMUP_CALLS, GraphRunner
from bertfast.tasks.features import tokenize
from bertfast.training import finetune_step, pretrain_model
from bertfast.training import step as train_step
from bertfast.training.finetuning import Finetuning
from bertfast.training.pretraining import Pretraining, pretrain
from bertfast.training.step import TrainStep

pytestmark = pytest.mark.slow

aten = torch.ops.aten
ASKS_THE_DEVICE = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select)
READS_MEMORY = (torch.Tensor.tolist, torch.Tensor.numpy)  # of which, on a CPU, no operation tells


class NoReads(TorchFunctionMode):
    """Forbids what copies a tensor's values to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS_MEMORY:
            raise RuntimeError(f"{function.__name__} waits for the device, which is capturing")
        return function(*args, **(kwargs or {}))


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
    with NoReads(), recording:
        result = function()
    return result, recording.replay


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The host reads no lengths, as on a GPU."""
    for module in (sequences, unpadding):
        monkeypatch.setattr(module, "is_readable", lambda x: False)


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


def listing(capture) -> tuple[list, Callable]:
    """Return a list, and a function that captures by `capture` and appends to the list what it captures."""
    captured = []

    def listed(function):
        captured.append(function)
        return capture(function)

    return captured, listed


def replay_steps(monkeypatch) -> list:
    """Make runs replay all steps but the first few; what they capture is listed."""
    captured, capture = listing(emulated_graph)

    def recording(*arguments, **options):
        return TrainStep(*arguments, **options | {"capture": capture})

    monkeypatch.setattr(pretrain_model, "TrainStep", recording)
    return captured


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_bitwise_identical(kind, data, tmp_path, monkeypatch, any_precision_runs):
    if kind == "a scaled loss":  # with GEMMs in fp32: a CPU has no fp16 kernels
        monkeypatch.setattr(train_step, "autocast", lambda *precision: nullcontext())
    settings = settings_for(tmp_path / "eager", data, **SHORT | KINDS[kind])
    pretrain(settings)
    captured = replay_steps(monkeypatch)
    pretrain(settings.replace(output_dir=str(tmp_path / "replayed")))
    assert len(captured) == (3 if settings.batch.second_phase_length else 2)
    assert losses(tmp_path / "eager") == losses(tmp_path / "replayed")
    assert_same_weights(tmp_path / "eager", tmp_path / "replayed")


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_a_step_that_is_not_finite_changes_no_parameter_and_no_state(optimizer, replayed, data, tmp_path, monkeypatch):
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


def test_a_captured_step_without_attention_kernels_reads_no_lengths(data, tmp_path, monkeypatch, as_on_a_device):
    """Else those of one batch would stand in the graph for all."""
    sizes = SIZES.replace("num_attention_heads=1", "num_attention_heads=2")
    settings = settings_for(tmp_path / "eager", data, **SHORT | {"config_overrides": sizes})
    pretrain(settings)
    assert len(replay_steps(monkeypatch)) == 0
    pretrain(settings.replace(output_dir=str(tmp_path / "replayed")))
    assert losses(tmp_path / "eager") == losses(tmp_path / "replayed")


def test_reading_lengths_on_the_host_is_refused_during_capture():
    given = Sequences.from_lengths([2, 3])
    with pytest.raises(RuntimeError, match="tolist waits for the device"):
        emulated_graph(lambda: torch.tensor(given.lengths))


def test_pending_steps_are_read_together_on_a_device(data, tmp_path):
    """As on a GPU: the same entries as when each is read at once."""
    for name, steps in (("each", 1), ("together", 5)):
        run = Pretraining(settings_for(tmp_path / name, data, **SHORT))
        run.steps_per_read = steps
        run.run(lambda step: None)
    assert losses(tmp_path / "each") == losses(tmp_path / "together")
    assert [entry["step"] for entry in entries(tmp_path / "together") if "tflops" in entry] == list(range(1, 13))


class Inputs:
    """A batch of one tensor."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def to(self, device, non_blocking=False):
        return Inputs(self.x.clone())

    def tensors(self):
        return [self.x]

    def options(self):
        return ()


def test_a_runner_captures_frequent_shapes_up_to_its_limit():
    captured, capture = listing(emulated_graph)
    runner = GraphRunner(lambda batch: batch.x * 2, torch.device("cpu"), capture, max_graphs=2)
    for call in range(WARMUP_CALLS + 4):
        for size in (1, 2, 3):
            x = torch.full((size,), float(call))
            assert torch.equal(runner(Inputs(x)), x * 2)
        assert len(captured) == (2 if call >= WARMUP_CALLS else 0), "the third shape stays eager"
    assert len(runner.graphs) == 2


FINETUNING = [
    "sequence-classification",
    "regression",
    "multi-label",
    "multiple-choice",
    "question-answering",
    "token-classification",
]


def capture_passes(monkeypatch, module, capture) -> list:
    """Make what `module` runs be captured by `capture`; what is captured is listed."""
    captured, listed = listing(capture)
    monkeypatch.setattr(module, "capture_for", lambda *arguments, **options: listed)
    return captured


def never(function):
    raise AssertionError("captured too early")


def finetuned(kind, pretrained, folder, **changes) -> Finetuning:
    folder.mkdir()
    options = {"per_device_train_batch_size": 12, "num_train_epochs": 3, "learning_rate": 1e-3, "dropout": 0.2}
    file = write_examples(folder, kind, 60, seed=0)
    run = Finetuning(finetuning_settings(kind, pretrained, file, folder / "out", **options | changes))
    run.run(lambda step: None)
    return run


@pytest.mark.parametrize("kind", FINETUNING)
def test_replayed_fine_tuning_is_bitwise_identical_with_eager(kind, pretrained, tmp_path, monkeypatch, as_on_a_device):
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "WARMUP_CALLS", 10**9)
        capture_passes(patch, finetune_step, never)
        eager = finetuned(kind, pretrained, tmp_path / "eager")
    captured = capture_passes(monkeypatch, finetune_step, emulated_graph)
    replayed = finetuned(kind, pretrained, tmp_path / "replayed")
    assert len(captured) >= 2, "the gradients and the update"
    assert len(replayed.trainer.calls) >= len(captured) - 1
    assert eager.results.losses == replayed.results.losses
    assert len(set(eager.results.losses)) == eager.steps
    assert_same_weights(tmp_path / "eager" / "out", tmp_path / "replayed" / "out")


@pytest.mark.parametrize("kind", FINETUNING)
def test_padding_slots_change_no_step_of_fine_tuning(kind, pretrained, tmp_path, monkeypatch):
    plain = finetuned(kind, pretrained, tmp_path / "plain")
    monkeypatch.setattr(cuda_graph, "WARMUP_CALLS", 10**9)
    capture_passes(monkeypatch, finetune_step, never)
    padded = finetuned(kind, pretrained, tmp_path / "padded")
    assert all(shape[0][1][0][1] % 8 == 0 for shape in padded.trainer.calls)
    assert padded.results.losses == pytest.approx(plain.results.losses, abs=1e-5)


def test_pending_fine_tuning_steps_are_read_together_on_a_device(pretrained, tmp_path):
    """As on a GPU: the same entries as when each is read at once."""
    runs = []
    for name, steps in (("each", 1), ("together", 4)):
        folder = tmp_path / name
        folder.mkdir()
        file = write_examples(folder, "sequence-classification", 60, seed=0)
        run = Finetuning(
            finetuning_settings("sequence-classification", pretrained, file, folder / "out", logging_steps=4)
        )
        run.steps_per_read = steps
        run.run(lambda step: None)
        runs.append((run.results.losses, [entry.get("loss") for entry in entries(folder / "out")]))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == run.steps


@pytest.mark.parametrize("kind", FINETUNING)
def test_replayed_predictions_are_bitwise_identical_with_eager(kind, pretrained, tmp_path, monkeypatch, as_on_a_device):
    run = finetuned(kind, pretrained, tmp_path / "run", num_train_epochs=1, eval_tokens=40)
    features = run.features["train"]
    plain = prediction.predict_outputs(run.task, run.model, features)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "WARMUP_CALLS", 10**9)
        capture_passes(patch, prediction, never)
        eager = prediction.predict_outputs(run.task, run.model, features)
    captured = capture_passes(monkeypatch, prediction, emulated_graph)
    replayed = prediction.predict_outputs(run.task, run.model, features)
    assert captured
    for one, other, without_padding in zip(eager, replayed, plain, strict=True):
        assert np.array_equal(one, other)
        np.testing.assert_allclose(one, without_padding, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "none"])
def test_replayed_embeddings_are_bitwise_identical_with_eager(
    pooling, pretrained, tmp_path, monkeypatch, as_on_a_device
):
    options = {"pooling": pooling, "eval_tokens": 60, "device": "cpu", "precision": "fp32"}
    settings = embedding.EmbedSettings.of(model_name_or_path="model", output_dir="out", **options)
    model = BertModel.from_pretrained(pretrained)
    random_ = random.Random(0)
    texts = [" ".join(random_.choices(FILLERS, k=random_.randint(3, 9))) for _ in range(80)]
    features = tokenize(load_tokenizer(pretrained), texts, 24)
    plain = embedding.compute_embeddings(model, features, settings)["embeddings"]
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "WARMUP_CALLS", 10**9)
        capture_passes(patch, embedding, never)
        eager = embedding.compute_embeddings(model, features, settings)["embeddings"]
    captured = capture_passes(monkeypatch, embedding, emulated_graph)
    assert torch.equal(embedding.compute_embeddings(model, features, settings)["embeddings"], eager)
    assert captured
    torch.testing.assert_close(eager, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no CUDA graphs")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_a_cuda_graph_is_bitwise_identical(kind, data, tmp_path, monkeypatch):
    settings = settings_for(tmp_path / "eager", data, **SHORT | KINDS[kind] | {"device": "cuda", "cuda_graph": False})
    pretrain(settings)
    replayed = settings.replace(output_dir=str(tmp_path / "replayed"), cuda_graph=True)
    captured, capture = listing(cuda_graph.cuda_graphs())
    monkeypatch.setattr(pretrain_model, "cuda_graphs", lambda: capture)
    pretrain(replayed)
    assert len(captured) >= 2, "the gradients and the update"
    assert losses(tmp_path / "eager") == losses(tmp_path / "replayed")
    assert_same_weights(tmp_path / "eager", tmp_path / "replayed")
