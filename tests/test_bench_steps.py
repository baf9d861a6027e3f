"""The benchmarks of a pre-training step and of data preparation run at small sizes, and report what they should."""

import json
import time
from pathlib import Path

import pytest
import torch
from test_bench import program, run

from bench import report
from bench.end_to_end import pretraining_step, train_step
from bench.end_to_end.step_cases import ALL, CASES, GPU_CASES, MODERNBERT_CASES
from bench.figures import case_title, step_case
from bench.harness import compile_backward_with_forward
from bench.page.data import data_text
from bench.page.rows import Result
from bench.sass_model.predictions import predicted_times
from bertfast.architectures import FAMILIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_a_pretraining_step_is_timed_with_real_lengths(tmp_path):
    program("end_to_end.pretraining_step", "trial-wikipedia", "--repeats=1", f"--results={tmp_path}")
    result = json.loads((tmp_path / "pretraining_step-trial-wikipedia.json").read_text())
    assert len(result["lengths"]) == 4
    assert max(result["lengths"]) <= 128
    assert result["tokens"] == sum(result["lengths"])
    assert result["ratios"]["transformers-sdpa"] > 0
    assert result["optimizer_s"] > 0


@pytest.mark.skipif("modernbert" not in FAMILIES, reason="this transformers has another ModernBERT, or none")
def test_a_pretraining_step_of_modernbert_is_timed(tmp_path):
    program("end_to_end.pretraining_step", "trial-modernbert", "--repeats=1", f"--results={tmp_path}")
    result = json.loads((tmp_path / "pretraining_step-trial-modernbert.json").read_text())
    assert result["lengths"] == [64, 64]
    assert result["tokens"] == result["padded_tokens"] == 128
    assert 0.15 < result["masked"] / result["tokens"] < 0.45
    assert result["seconds"].keys() == {"bertfast", "transformers-sdpa"}
    bertfast, transformers = result["loss_without_dropout"].values()
    assert bertfast == pytest.approx(transformers, rel=1e-4)


def test_a_wrong_gradient_is_found_although_the_loss_is_right(monkeypatch):
    original = pretraining_step.packed_loss

    def planted(model, batch):
        weight = next(p for name, p in model.named_parameters() if name.endswith("query.weight"))
        return original(model, batch) + (weight - weight.detach()).sum()

    monkeypatch.setattr(pretraining_step, "packed_loss", planted)
    with pytest.raises(pretraining_step.DifferentResultsError, match=r"gradient of bert\.encoder\.layer\..*query"):
        pretraining_step.measure("trial", ALL["trial"], {"transformers-sdpa": pretraining_step.Alternative()}, 1, 60)


def test_different_results_do_not_drop_the_other_cases(tmp_path, monkeypatch, capsys):
    def measure(name, *_):
        if name == "trial":
            raise pretraining_step.DifferentResultsError("the losses differ")
        return {"case": name, "ratios": {}, "not_run": {}}

    monkeypatch.setattr(pretraining_step, "measure", measure)
    monkeypatch.setattr(pretraining_step, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["pretraining_step", "trial", "trial-wikipedia", f"--results={tmp_path}"])
    with pytest.raises(SystemExit, match=r"the results differ: trial$"):
        pretraining_step.main()
    assert "trial: the losses differ" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["pretraining_step-trial-wikipedia.json"]


def test_the_step_of_a_pretraining_run_is_timed_and_reported(tmp_path):
    program("end_to_end.train_step", "trial", "--repeats=2", f"--results={tmp_path}")
    step = json.loads((tmp_path / "train_step-trial.json").read_text())["train_step"]
    assert (step["tokens"], len(step["seconds"])) == (64, 2)
    assert step["captured"] == torch.cuda.is_available()
    assert "| trial | 64 | " in report.short([{"train_step": step}])
    expected = predicted_times()["pre-training step, length 128, fp32 stream, Triton"]
    case = train_step.CASES["128-fp32-stream"]
    assert case.sequences * case.length == 32_768
    step |= {"predicted_case": case.predicted_case, "median_s": 2e-6 * expected}
    assert f" | {expected / 1e3:.2f} | 2.00 |" in report.short([{"train_step": step}])


def test_cases_of_steps_are_named_after_model_batch_and_precision():
    values = {"case": "modernbert-base-1024-bf16", "lengths": [1024] * 8}
    assert case_title(values) == "ModernBERT-base, 8 x 1,024 tokens, bf16"
    assert case_title({"case": "gpu-large-512", "lengths": [100, 512]}) == "BERT-large, 2 x ≤ 512 tokens, bf16"
    for name, case in (CASES | MODERNBERT_CASES | GPU_CASES).items():
        found = step_case({"case": name, "lengths": case.sample_lengths()})
        assert found.precision == ("fp32" if case.dtype == torch.float32 else "bf16")
        assert found.model.lower().split("-")[-1] == case.preset
    with pytest.raises(ValueError, match="not understood"):
        step_case({"case": "trial", "lengths": [1]})


def test_a_call_that_times_out_or_fails_gets_a_reason():
    from bench.end_to_end.pretraining_step import within

    seconds, reason = within(1, lambda: time.sleep(60))
    assert 1 <= seconds < 30
    assert reason == "TimeoutError: not done after 1 s"
    assert within(9, lambda: {}["key"])[1] == "KeyError: 'key'"
    assert within(9, lambda: None)[1] is None


def test_data_is_prepared_as_many_tokens_as_transformers_finds(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "house", "is", "old", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "text.txt").write_text("the house is old . the old house is old .\n\n" * 500)
    options = (f"--tokenizer={tmp_path / 'vocab.txt'}", "--repeats=2", f"--results={tmp_path}")
    program("end_to_end.data", str(tmp_path / "text.txt"), *options)
    values = json.loads((tmp_path / "data.json").read_text())
    made, alternatives = values["preparation"], values["alternatives"]
    assert alternatives["preparation"]["tokens"] == made["tokens"] == 500 * 11
    assert len(made["seconds_samples"]) == len(alternatives["preparation"]["seconds_samples"]) == 2
    text = data_text(Result("data.json", values))
    assert "transformers, tokenizer only" in text
    row = next(line for line in text.splitlines() if line.startswith("| ≤ 128 tokens, masked LM | 4,096"))
    assert row.endswith(" x |")


def test_the_figure_of_a_step_has_a_bar_per_implementation(tmp_path):
    pytest.importorskip("matplotlib")
    result = ROOT / "bench" / "results" / "avx512" / "pretraining_step-base-128-fp32.json"
    ran = run("-m", "bench.figures", str(result), "--output", str(tmp_path / "step.png"))
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_drawn_of_uncommitted_code(tmp_path):
    (tmp_path / "dirty.json").write_text(json.dumps({"origin": {"commit": "0123+changes"}}))
    ran = run("-m", "bench.figures", str(tmp_path / "dirty.json"), "--output", str(tmp_path / "step.png"))
    assert ran.returncode == 2
    assert "uncommitted changes" in ran.stderr


def test_the_time_of_a_step_is_divided_among_groups_of_operators():
    from bench.end_to_end import step_parts

    seconds = step_parts.measure("trial", 1)["seconds"]
    assert seconds.keys() == {"bertfast", "transformers", "transformers, eager attention"}
    for groups in seconds.values():
        for name in ("GEMM", "attention", "optimizer", "loss", "dropout, LayerNorm, GELU"):
            assert groups[name] > 0, (groups, name)
        assert groups["other"] < 0.25 * sum(groups.values())


def test_a_time_limit_includes_the_compilation_of_the_backward_pass():
    import torch._functorch.config
    from torch._dynamo.backends.common import aot_autograd

    if not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        pytest.skip("this PyTorch always compiles it later")
    compiled = []

    def compiler(name):
        return lambda graph, inputs: compiled.append(name) or graph.forward

    with torch._functorch.config.patch(force_non_lazy_backward_lowering=False):
        compile_backward_with_forward()
        backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
        output = torch.compile(lambda x: x.sin().sum(), backend=backend)(torch.ones(3, requires_grad=True))
        assert compiled == ["forward", "backward"]
    output.backward()
    assert len(compiled) == 2
