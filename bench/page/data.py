"""Preparation of text and assembly of batches, against transformers."""

from __future__ import annotations

from typing import Any

from bench.page.rows import Result, spread_of
from bench.page.text import duration, table

OBJECTIVES = {"auto": "masked LM and next sentence", "mlm+nsp": "masked LM and next sentence", "mlm": "masked LM"}


def data_text(result: Result) -> str:
    """Return the tables of data preparation and of batches."""
    made, threads = result.values["preparation"], result.origin["threads"]
    alternatives = result.values.get("alternatives", {})
    text = (
        f"### Data preparation\n\n"
        f"`bertfast prepare` turns {made['documents']:,} documents ({made['bytes'] / 1e6:.1f} MB of compressed files) "
        f"into token shards on all cores, in processes of at most {made['peak_memory_mb']:.0f} MB: it decompresses, "
        "splits sentences, tokenizes and writes. The alternative, transformers' fast tokenizer, only decompresses and "
        "tokenizes the same documents; it must find as many tokens. No lower bound applies: there are no GEMMs "
        f"(`bench/results/{result.file}`, measured by `bench/end_to_end/data.py`).\n\n"
    )
    columns = ["preparation", "time", "20 to 80 %", "n", "documents/s", "M tokens/s", "vs bertfast"]
    rows = [_preparation("**bertfast**", made, made)]
    if other := alternatives.get("preparation"):
        rows.append(_preparation("transformers, tokenizer only", other, made))
    text += f"{table(columns, rows)}\n\n"
    text += (
        f"Batches are then assembled from the shards by one process on {threads} thread, planning and masking "
        "included; the fill is the share of their slots that contain tokens. transformers' collator for masked LM gets "
        "samples of exactly the largest length, tokenized and cut before, so that it pads nothing.\n\n"
    )
    columns = ["samples", "tokens per bin", "bertfast, M tokens/s", "20 to 80 %", "fill", "transformers, M tokens/s"]
    others = {_key(each): each for each in alternatives.get("batches", [])}
    rows = [_batch(each, others.get(_key(each))) for each in result.values["batches"]]
    return f"{text}{table([*columns, 'transformers / bertfast'], rows)}\n"


def _preparation(name: str, found: dict[str, Any], bertfast: dict[str, Any]) -> list[str]:
    samples = found.get("seconds_samples", [found["seconds"]])
    spread = " to ".join(map(duration, spread_of(samples))) if len(samples) > 1 else ""
    rates = [f"{bertfast['documents'] / found['seconds']:,.0f}", f"{found['tokens'] / found['seconds'] / 1e6:.2f}"]
    ratio = "" if found is bertfast else f"{found['seconds'] / bertfast['seconds']:.2f} x"
    return [name, duration(found["seconds"]), spread, str(len(samples)), *rates, ratio]


def _key(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["max_seq_length"], batch["objective"], batch["whole_word"], batch["tokens_per_bin"]


def _batch(found: dict[str, Any], other: dict[str, Any] | None) -> list[str]:
    samples = found.get("tokens_per_second_samples", [])
    spread = " to ".join(f"{rate / 1e6:.1f}" for rate in spread_of(samples)) if len(samples) > 1 else ""
    title = f"≤ {found['max_seq_length']} tokens, {OBJECTIVES[found['objective']]}"
    rate = found["tokens_per_second"]
    cells = [title + ", whole words" * found["whole_word"], f"{found['tokens_per_bin']:,}", f"{rate / 1e6:.1f}", spread]
    ratio = other["tokens_per_second"] / rate if other else None
    cells += [f"{found['fill']:.1%}", f"{other['tokens_per_second'] / 1e6:.1f}" if other else ""]
    return [*cells, "" if ratio is None else f"{ratio:.2f} x"]
