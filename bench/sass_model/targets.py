"""Targets for an H200, and whether the predictions of `predict.py` reach them.

The model was compared with published times of two kernels of others. A target that is reached by less than the largest
error of that comparison is not called reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.sass_model import published, published_rows
from bench.sass_model.cases import MIXED, ceil_div
from bench.sass_model.cuda_cases import BLOCK, STEP
from bench.sass_model.training_cases import LOSS, TABLES

_SHAPE, _TFLOPS, _SHARE, _TIME, _BOUND = 2, 7, 9, 6, 10  # columns of the table
_MATMULS, _ROWS = "matmuls", "rows"  # what the published kernels are
_PAGES = {_MATMULS: published.PAGE, _ROWS: published_rows.PAGE}


@dataclass(frozen=True)
class Target:
    """A target for a row of the table, of which one entry is given.

    Attributes:
        kernel: The row's kernel, or what several kernels do.
        case: Its case.
        tflops: At least this many TFLOP/s.
        percent: At least this percentage of `limit`.
        microseconds: At most this time.
        limit: What the percentage is of.
    """

    kernel: str
    case: str
    tflops: int | None = None
    percent: int | None = None
    microseconds: int | None = None
    limit: str = "the limit"

    def bound(self) -> tuple[int, str, int]:
        """Return the number that is to be reached, its unit and the column of the table that has it."""
        if self.microseconds is not None:
            return self.microseconds, " µs", _TIME
        if self.tflops is not None:
            return self.tflops, " TFLOP/s", _TFLOPS
        assert self.percent is not None, "a target has one of the three"
        return self.percent, f"% of {self.limit}", _SHARE

    def reached(self, predicted: float) -> bool:
        """Return whether a prediction reaches the target."""
        least, _, column = self.bound()
        return predicted <= least if column == _TIME else predicted >= least

    def margin(self, predicted: float) -> float:
        """Return by how much of the target a prediction is better, negative if it is worse."""
        least, _, column = self.bound()
        return (least / predicted if column == _TIME else predicted / least) - 1

    @property
    def kind(self) -> str:
        """Which published kernel this one is like: a row kernel, or else attention, whose error is the larger one."""
        of_rows = self.percent is not None and self.limit == "the limit" and "attention" not in self.kernel
        return _ROWS if of_rows else _MATMULS


FORWARD = "attention_forward", "attention_forward_kernel<BFloat16, 64>"
KEYS = "attention_keys_kernel<BFloat16, 64, {}>"  # all gradients of sequences of up to this many tokens
_ROW_SHAPE = "<BFloat16, BFloat16, RowShape<3, 1, true>>"
LAYER_NORM = "add_layer_norm_{}", "add_layer_norm_{}_kernel" + _ROW_SHAPE
GELU = "bias_gelu_{}", "bias_gelu_{}_kernel<BFloat16, true, false>"
GELU_LAYER_NORM = "gelu_layer_norm_{}", "gelu_layer_norm_{}_kernel" + _ROW_SHAPE
# Row kernels, each with its case.
_ROW_KERNELS = (
    *((kernel, "768 columns") for kernel in LAYER_NORM),
    *((kernel, "768 columns, dropout") for kernel in LAYER_NORM),
    ("add_layer_norm_{}", "768 columns, fp32 stream, dropout"),
    ("pre_norm_{}", "768 columns"),
    *((kernel, "3,072 columns") for kernel in GELU),
    ("gated_activation_{}", "1,152 columns"),
    *((kernel, "768 columns") for kernel in GELU_LAYER_NORM),
    *(("embeddings_{}", f"{TABLES}, {dtype}") for dtype in ("bf16", "fp32")),
)
_LOSS_KERNELS = (
    "cross_entropy",
    "cross_entropy_gradient",
    "loss_kernel<BFloat16, true>",
    "gradient_kernel<BFloat16, true>",
)
TARGETS = (
    *(Target(kernel, "length 128", percent=95) for kernel in FORWARD),
    *(Target(kernel, "length 512", tflops) for kernel, tflops in zip(FORWARD, (390, 415), strict=True)),
    *(Target(kernel, "length 512, dropout", tflops) for kernel, tflops in zip(FORWARD, (280, 300), strict=True)),
    *(Target(kernel, "length 128", 240) for kernel in ("attention_backward_short", KEYS.format(256))),
    Target("both kernels", "length 512", 250),
    Target(KEYS.format(512), "length 512", 360),
    *(
        Target(kernel.format(pass_name), case, percent=90)
        for kernel, case in _ROW_KERNELS
        for pass_name in ("forward", "backward")
    ),
    Target("rotary", "12 heads of 64", percent=90),
    *(Target(kernel, LOSS, percent=90) for kernel in _LOSS_KERNELS),
    *(Target("embeddings_backward", f"32,768 tokens, {dtype}, Triton", microseconds=150) for dtype in ("bf16", "fp32")),
    Target("linear_cross_entropy", "5,000 x 768 x 30,522, Triton", microseconds=1400),
    *(
        Target("pre-training step", f"length 128, {stream} stream, {kernels}", percent=62, limit="790 TFLOP/s")
        for stream in ("fp32", "bf16")
        for kernels in ("Triton", "fastest")
    ),
)
# Kernels that are compared at mixed lengths and at one length of as many sequences, 300 tokens.
MIXED_KERNELS = (FORWARD[0], "attention_d_q", "attention_d_kv", FORWARD[1], KEYS.format(512))
_MIXED_CASE, _UNIFORM_CASE = f"lengths 4 to {max(MIXED)}", "length 300"
_MIXED_PERCENT = 90


_ABOUT = (
    "How far off the model may be: compared with published times, it is at most {matmuls} % too fast for "
    "[attention](sass_model_published.md), and {rows} % for [a row kernel](sass_model_published_rows.md) that is bound "
    "by memory. A target that is reached by less is called `within the error`: it may be missed on a GPU. Sums of "
    "several kernels were compared with nothing; they are judged by the error of attention. The time of a kernel that "
    "is bound by latency also depends on ptxas's order of instructions, 10 % in one case (bench/LOG.md). Rows named "
    "`fastest` cannot be selected, see above. The 62 % of a step count all layers on all tokens; the column `executed` "
    "above has what is computed.",
    "Sequences of mixed lengths are to be within 10 % of uniform ones. Compared are TFLOP/s with all scores that are "
    "computed, in whole tiles, because sequences of 300 tokens, as many as in the mixture, fill their tiles worse; "
    "in parentheses the same compared with 512 tokens. In the CUDA C++ backward pass, the model has neither the masks "
    "nor the zeroed rows of ragged ends.",
)


def published_errors() -> dict[str, int]:
    """Return by how many percent the model is at most too fast, compared with each kind of published kernel."""
    return {kind: largest_error(page) for kind, page in _PAGES.items()}


def largest_error(page: Path) -> int:
    """Return the largest error of a page with comparisons, in percent.

    Raises:
        ValueError: The page has no error.
    """
    errors = re.findall(r"\| ([+-]\d+)% \|", page.read_text(encoding="utf-8"))
    if not errors:
        program = page.stem.removeprefix("sass_model_")
        raise ValueError(f"{page.name} has no column of errors: write it again, see bench/sass_model/{program}.py")
    return max(map(int, errors))


def section(table: Sequence[str], errors: Mapping[str, int]) -> list[str]:
    """Return the lines about all targets whose row is in the table, and what bounds a miss; none without such a row.

    Args:
        table: Lines of the table, and of the one about operations of several kernels.
        errors: Percent by which predictions may be too fast, see `published_errors`.
    """
    rows = {(cells[0], cells[1]): cells for cells in map(_cells, table) if len(cells) > _BOUND}
    lines = [_line(target, rows, errors) for target in TARGETS if (target.kernel, target.case) in rows]
    lines += _mixed_lines(rows)
    if not lines:
        return []
    columns = "| kernel | case | target | predicted | margin | reached | bound by, unless it is reached |"
    about = [line.format(**errors) for line in _ABOUT]
    return ["", "## Targets", "", about[0], "", about[1], "", columns, "|---" * 7 + "|", *lines]


def _line(target: Target, rows: Mapping[tuple[str, str], list[str]], errors: Mapping[str, int]) -> str:
    cells = rows[target.kernel, target.case]
    least, unit, column = target.bound()
    predicted = float(cells[column].rstrip("%"))
    margin = target.margin(predicted)
    reached = "yes" if 100 * margin > errors[target.kind] else "within the error" if target.reached(predicted) else "no"
    bound = "" if reached == "yes" else cells[_BOUND] or _slowest(target, list(rows.values()))
    numbers = f"{least}{unit} | {predicted:.0f}{unit} | {margin:+.0%}"
    return f"| {target.kernel} | {target.case} | {numbers} | {reached} | {bound} |"


def _mixed_lines(rows: Mapping[tuple[str, str], list[str]]) -> Iterator[str]:
    """Yield the lines about mixed lengths, for the kernels whose rows are there."""
    for dropout in ("", ", dropout"):
        for kernel in MIXED_KERNELS:
            lengths = {_MIXED_CASE: MIXED, _UNIFORM_CASE: (300,), "length 512": (512,)}
            found = {case: cells for case in lengths if (cells := rows.get((kernel, case + dropout)))}
            if len(found) < len(lengths):
                continue
            mixed, uniform, longest = (_executed_tflops(cells, lengths[case]) for case, cells in found.items())
            share = 100 * mixed / uniform
            reached = "yes" if round(share) >= _MIXED_PERCENT else "no"
            numbers = f"{_MIXED_PERCENT}% of 300 tokens | {share:.0f}% ({100 * mixed / longest:.0f}%)"
            bound = "" if reached == "yes" else "ragged ends and the balance of SMs"
            yield (
                f"| {kernel} | {_MIXED_CASE}{dropout} | {numbers} | {share / _MIXED_PERCENT - 1:+.0%} | {reached} "
                f"| {bound} |"
            )


def _executed_tflops(cells: Sequence[str], lengths: Sequence[int]) -> float:
    """Return the TFLOP/s of a row with the scores beyond the ends of sequences that fill up its tiles."""
    shape = re.match(r"(\d+) x (\d+),", cells[_SHAPE])
    of_cuda = BLOCK, STEP if "keys" in cells[0] else BLOCK  # the forward pass takes as many keys as queries
    rows, columns = map(int, shape.groups()) if shape else of_cuda
    tiles = sum(ceil_div(length, rows) * ceil_div(length, columns) for length in lengths)
    return float(cells[_TFLOPS]) * tiles * rows * columns / sum(length**2 for length in lengths)


def _slowest(target: Target, rows: list[list[str]]) -> str:
    """Return what bounds the slowest of the kernels whose sum is the target's row."""
    members = [cells for cells in rows if cells[1] == target.case and cells[_BOUND] and "<" not in cells[0]]
    members = [cells for cells in members if "forward" not in cells[0]]
    slowest = max(members, key=lambda cells: float(cells[_TIME]))
    return f"{slowest[0]}: {slowest[_BOUND]}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
