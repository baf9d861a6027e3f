"""Targets for an H200, and whether the predictions of `predict.py` reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.sass_model.training_cases import LOSS

_TFLOPS, _SHARE, _TIME, _BOUND = 7, 9, 6, 10  # columns of the table


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


FORWARD = "attention_forward", "attention_forward_kernel<BFloat16, 64>"
KEYS = "attention_keys_kernel<BFloat16, 64, {}>"  # all gradients of sequences of up to this many tokens
LAYER_NORM = "add_layer_norm_{}", "add_layer_norm_{}_kernel<BFloat16, BFloat16, RowShape<3, 1, true>>"
GELU = "bias_gelu_{}", "bias_gelu_{}_kernel<BFloat16, true, false>"
TARGETS = (
    *(Target(kernel, "length 128", percent=95) for kernel in FORWARD),
    *(Target(kernel, "length 512", tflops) for kernel, tflops in zip(FORWARD, (390, 415), strict=True)),
    *(Target(kernel, "length 512, dropout", tflops) for kernel, tflops in zip(FORWARD, (280, 300), strict=True)),
    *(Target(kernel, "length 128", 240) for kernel in ("attention_backward_short", KEYS.format(256))),
    Target("both kernels", "length 512", 250),
    Target(KEYS.format(512), "length 512", 360),
    *(
        Target(kernel.format(pass_name), case, percent=90)
        for kernels, case in ((LAYER_NORM, "768 columns"), (GELU, "3,072 columns"))
        for kernel in kernels
        for pass_name in ("forward", "backward")
    ),
    *(Target(f"pre_norm_{pass_name}", "768 columns", percent=90) for pass_name in ("forward", "backward")),
    *(Target(f"gated_activation_{pass_name}", "1,152 columns", percent=90) for pass_name in ("forward", "backward")),
    Target("rotary", "12 heads of 64", percent=90),
    *(
        Target(f"{kernel}_{pass_name}", case, percent=90)
        for kernel, case in (
            ("add_layer_norm", "768 columns, fp32 stream, dropout"),
            ("gelu_layer_norm", "768 columns"),
        )
        for pass_name in ("forward", "backward")
    ),
    *(Target(kernel, LOSS, percent=90) for kernel in ("cross_entropy", "cross_entropy_gradient")),
    *(Target("embeddings_backward", f"32,768 tokens, {dtype}, Triton", microseconds=150) for dtype in ("bf16", "fp32")),
    Target("linear_cross_entropy", "5,000 x 768 x 30,522, Triton", microseconds=1400),
    *(
        Target("pre-training step", f"length 128, {stream} stream, {kernels}", percent=62, limit="790 TFLOP/s")
        for stream in ("fp32", "bf16")
        for kernels in ("Triton", "fastest")
    ),
)


_ABOUT = "Sequences of mixed lengths, in the table above, have no target of their own: compare with one length."


def section(table: Sequence[str]) -> list[str]:
    """Return the lines about all targets whose row is in the table, and what bounds a miss; none without such a row."""
    rows = {(cells[0], cells[1]): cells for cells in map(_cells, table) if len(cells) > _BOUND}
    lines = []
    for target in TARGETS:
        if (cells := rows.get((target.kernel, target.case))) is None:
            continue
        least, unit, column = target.bound()
        predicted = float(cells[column].rstrip("%"))
        bound = "" if target.reached(predicted) else cells[_BOUND] or _slowest(target, list(rows.values()))
        lines.append(f"| {target.kernel} | {target.case} | {least}{unit} | {predicted:.0f}{unit} | {bound} |")
    if not lines:
        return []
    columns = "| kernel | case | target | predicted | bound by, if it is missed |"
    return ["", "## Targets", "", _ABOUT, "", columns, "|---|---|---|---|---|", *lines]


def _slowest(target: Target, rows: list[list[str]]) -> str:
    """Return what bounds the slowest of the kernels whose sum is the target's row."""
    members = [cells for cells in rows if cells[1] == target.case and cells[_BOUND] and "<" not in cells[0]]
    members = [cells for cells in members if "forward" not in cells[0]]
    slowest = max(members, key=lambda cells: float(cells[_TIME]))
    return f"{slowest[0]}: {slowest[_BOUND]}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
