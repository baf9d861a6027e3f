"""Time the cases of `bench.compare` in this process, with the bertfast that is on the path.

    PYTHONPATH=FOLDER python bench/compare_cases.py CASE …

Prints a line of JSON per case: a number computed from its outputs, or why it does not run. Then it answers each line of
standard input: to "call" with the seconds of a call, to anything else with the next case. So two processes can take
turns. Only public names of bertfast are used, so that older commits can be measured, and nothing else of `bench` is
imported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import bertfast

Sizes = dict[str, Any]  # of a BertConfig
SMALL: Sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
MINILM: Sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BASE: Sizes = {}  # transformers' defaults
PAIRS = [32 + round(index * 96 / 15) for index in range(16)]  # tokens of 16 samples for pre-training
# Tokens of 32 sentences of SST-2.
SENTENCES = [10, 32, 21, 19, 34, 29, 25, 17, 12, 40, 15, 29, 30, 13, 40, 40]
SENTENCES += [16, 31, 44, 22, 10, 20, 12, 22, 27, 23, 36, 35, 24, 15, 52, 25]


class Prepared(NamedTuple):
    """A case that is ready to run: the call to time, and a number that depends on all of its outputs."""

    call: Callable[[], object]
    value: float


def padded(lengths: list[int]) -> dict[str, Tensor]:
    """Return random inputs of these lengths, padded to the longest."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def build(source: Any, name: str, sizes: Sizes) -> Any:
    """Return the model NAME of `source`, transformers or bertfast, with the weights that transformers initialises."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes)
    original = getattr(transformers, name)(config)
    if source is transformers:
        return original.eval()
    model = getattr(source, name)(config)
    model.load_state_dict(original.state_dict())
    return model.eval()


def training(name: str, sizes: Sizes, inputs: dict[str, Tensor]) -> Prepared:
    """Return a training step with dropout 0.1 and fused AdamW; its value is the loss without dropout."""
    model = build(bertfast, name, sizes)
    with torch.no_grad():
        value = model(**inputs).loss.item()
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-5, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(step, value)


def pretraining_step() -> Prepared:
    inputs = padded(PAIRS)
    masked = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(2)) < 0.15
    inputs["labels"] = inputs["input_ids"].where(masked & inputs["attention_mask"].bool(), -100)
    inputs["next_sentence_label"] = torch.arange(len(PAIRS)) % 2
    return training("BertForPreTraining", SMALL, inputs)


def finetuning_step() -> Prepared:
    labels = {"labels": torch.arange(len(SENTENCES)) % 2}
    return training("BertForSequenceClassification", MINILM, padded(SENTENCES) | labels)


def inference(model: Any, lengths: list[int]) -> Prepared:
    """Return a call of a model without gradients; its value is the mean absolute output of tokens."""
    inputs = padded(lengths)

    @torch.inference_mode()
    def call() -> Tensor:
        output: Tensor = model(**inputs).last_hidden_state
        return output

    return Prepared(call, call()[inputs["attention_mask"].bool()].abs().mean().item())


def patched_model() -> Prepared:
    model = build(transformers, "BertModel", MINILM)
    bertfast.patch(model)
    return inference(model, SENTENCES)


CASES: dict[str, Callable[[], Prepared]] = {
    "pre-training step": pretraining_step,
    "fine-tuning step": finetuning_step,
    "inference": lambda: inference(build(bertfast, "BertModel", BASE), SENTENCES),
    "patched model": patched_model,
    "sentence of 8 tokens": lambda: inference(build(bertfast, "BertModel", BASE), [8]),
    "sentence of 128 tokens": lambda: inference(build(bertfast, "BertModel", BASE), [128]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    for name in parser.parse_args().cases:
        found: dict[str, object] = {"case": name, "package": bertfast.__file__}
        prepared: Prepared | None = None
        try:
            prepared = CASES[name]()
            prepared.call()
            found["value"] = prepared.value
        except Exception as error:  # an older commit may lack what the case needs
            found["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(found), flush=True)
        while prepared is not None and sys.stdin.readline() == "call\n":
            started = time.perf_counter()
            prepared.call()
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
