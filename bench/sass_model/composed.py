"""The time of a pre-training step, of its embeddings' gradients and of its loss, as the sum of what they launch.

Kernels of this project take their predicted time, library operators that of `library_time.py`. Nothing overlaps: a
kernel starts when the one before has ended, as in a CUDA graph of one stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.sass_model import constants
from bench.sass_model import training_cases as cases
from bench.sass_model.cases import TOKENS
from bench.sass_model.constants import Gpu
from bench.sass_model.library_time import LibraryTime, library_time
from bench.sass_model.trace import Call
from bench.sass_model.workloads import STEP, Workload
from bertfast.kernels.attention_tiles import TILE

# What follows takes its time per row: its case has as many rows as `TOKENS`, or the loss's chunk.
_PER_ROW = ("add_layer_norm_", "bias_gelu_", "gelu_layer_norm_")
_GEMMS, _GAPS = "GEMMs", "gaps between kernels"


@dataclass(frozen=True)
class Time:
    """The predicted time of a row of the table.

    Attributes:
        kernel: The kernel's name.
        case: Its case.
        seconds: Its time.
        cuda: Whether it is in CUDA C++.
        bound: What bounds it.
    """

    kernel: str
    case: str
    seconds: float
    cuda: bool = False
    bound: str = ""


@dataclass(frozen=True)
class Part:
    """What one name contributes to a workload.

    Attributes:
        name: GEMMs, an operator of bertfast or one of PyTorch, or the gaps between kernels.
        own: Whether it is a kernel of this project.
        launches: Number of its kernels.
        seconds: Their time.
    """

    name: str
    own: bool
    launches: int
    seconds: float


class Prices:
    """Times of the calls of a workload.

    Args:
        times: The rows of the table.
        workload: The workload.
        fastest: Whether to take CUDA C++ where that is faster, instead of Triton everywhere.
        gpu: The GPU.
    """

    def __init__(self, times: Iterable[Time], workload: Workload, fastest: bool, gpu: Gpu):
        self.workload, self.fastest, self.gpu = workload, fastest, gpu
        self.times = list(times)
        self.of_case = {(time.kernel, time.case): time for time in self.times if not time.cuda}

    def parts(self) -> list[Part]:
        """Return what the workload consists of, the largest part first, the gaps between kernels included."""
        found: dict[tuple[str, bool], list[LibraryTime]] = defaultdict(list)
        for call in self.workload.calls:
            if call.is_kernel:
                found[call.operator, True].append(LibraryTime(self._kernel_seconds(call), 1))
            else:
                name = _GEMMS if call.gemm else call.name
                found[name, False].append(library_time(call, self.gpu))
        parts = [
            Part(name, own, sum(one.launches for one in times), sum(one.seconds for one in times))
            for (name, own), times in found.items()
        ]
        launches = sum(part.launches for part in parts)
        parts.append(Part(_GAPS, False, 0, launches * constants.GRAPH_GAP))
        return sorted(parts, key=lambda part: -part.seconds)

    def contents(self, parts: Iterable[Part], least: float = 0.04) -> str:
        """Return the µs of each kernel and operator, the longest first, and what bounds the kernels.

        Args:
            parts: What `parts` returned.
            least: Share of the whole below which times are summed as "others".
        """
        of_name: dict[tuple[str, str], float] = defaultdict(float)
        for call in self.workload.calls:
            if call.is_kernel:
                of_name[call.name, self._bound(call)] += self._kernel_seconds(call)
            else:
                of_name[_GEMMS if call.gemm else call.name, ""] += library_time(call, self.gpu).seconds
        of_name[_GAPS, ""] = next(part.seconds for part in parts if part.name == _GAPS)
        total = sum(of_name.values())
        named = sorted((item for item in of_name.items() if item[1] >= least * total), key=lambda item: -item[1])
        cells = [f"{name} {1e6 * seconds:,.0f}" + (f": {bound}" if bound else "") for (name, bound), seconds in named]
        others = total - sum(seconds for _, seconds in named)
        return "; ".join([*cells, f"others {1e6 * others:,.0f}"])

    def _bound(self, call: Call) -> str:
        """Return what bounds a kernel of this project; "" if it only finds out that it has nothing to do."""
        if call.name in ("sum_blocks", "sum_groups"):
            cases_of_sum = (cases.EQUAL_BLOCKS,) if call.name == "sum_blocks" else (cases.WITHOUT, cases.WITH)
            found = [(call.name, f"{case}, {self._element(call.element)}") for case in cases_of_sum]
        elif self.fastest and self._share_of_cuda(call.operator) < 1:
            return "CUDA C++"
        else:
            found = [(call.name, self._case(call))]
        return ", ".join(self.of_case[key].bound for key in found if key in self.of_case)

    def _kernel_seconds(self, call: Call) -> float:
        """Return the time of a launch of a kernel of this project."""
        if call.name in ("sum_blocks", "sum_groups"):
            return self._sum_seconds(call)
        seconds = self._triton_seconds(call)
        if self.fastest:
            seconds *= self._share_of_cuda(call.operator)
        if call.name.startswith(_PER_ROW):
            return seconds * call.rows / TOKENS
        return seconds * call.rows / cases.CHUNK_ROWS if call.name.startswith("cross_entropy") else seconds

    def _triton_seconds(self, call: Call) -> float:
        """Return the time of a kernel with as many rows as its case has."""
        if call.name == "attention_backward_short" and self.workload.length > TILE:
            return self._idle_seconds(call.blocks)
        return self._look_up(call.name, self._case(call))

    def _idle_seconds(self, blocks: int) -> float:
        """Return the time of blocks that find out, one after the other on each SM, that they have nothing to do."""
        cycles = constants.BLOCK_START + 2 * constants.L2_LATENCY  # two loads, one after the other
        return -(-blocks // self.gpu.sms) * cycles / self.gpu.clock

    def _case(self, call: Call) -> str:
        """Return the case of a kernel in this workload."""
        kernel, stream = call.name, self.workload.stream
        if kernel.startswith("attention"):
            return f"length {self.workload.length:,}, dropout"
        if kernel.startswith("add_layer_norm"):
            return f"{cases.HIDDEN} columns, " + ("fp32 stream, dropout" if stream == "fp32" else "dropout")
        if kernel.startswith("embeddings"):
            return f"{cases.TABLES}, {self._element(call.element)}"  # of the tables, not of the stream
        if kernel.startswith("cross_entropy"):
            return cases.LOSS
        return f"{cases.HIDDEN} columns" if kernel.startswith("gelu_layer_norm") else f"{4 * cases.HIDDEN:,} columns"

    def _sum_seconds(self, call: Call) -> float:
        """Return the time of a kernel of `sum_by_index.py`: in a gather, each row occurs at most once."""
        of_embeddings, element = call.operator == "embeddings_backward", self._element(call.element)
        if call.name == "sum_blocks":
            return (
                self._look_up("sum_blocks", f"{cases.EQUAL_BLOCKS}, {element}") if of_embeddings else constants.SHORTEST
            )
        empty, used, longest, positions = (
            self._look_up("sum_groups", f"{case}, {element}")
            for case in (cases.WITHOUT, cases.WITH, cases.LONGEST, cases.USED_POSITIONS)
        )
        if of_embeddings:
            return max(empty + used, longest) if call.blocks == cases.VOCAB else positions
        gathered = call.rows / cases.DISTINCT
        return used * gathered + empty * (call.blocks - call.rows) / (cases.VOCAB - cases.DISTINCT)

    def _element(self, size: int) -> str:
        return "fp32" if size == 4 else "bf16"

    def _look_up(self, kernel: str, case: str) -> float:
        """Return the time of a kernel of Triton.

        Raises:
            ValueError: The table has no such row.
        """
        if (time := self.of_case.get((kernel, case))) is None:
            raise ValueError(f"the table has no row of {kernel}, {case}: add it to bench/sass_model/training_cases.py")
        return time.seconds

    def _share_of_cuda(self, operator: str) -> float:
        """Return the time of an operator in CUDA C++ relative to that in Triton; 1 if it is not faster or missing."""
        kernels = {call.name: call for call in self.workload.calls if call.operator == operator and call.is_kernel}
        if any(kernel.startswith("sum_") for kernel in kernels):  # CUDA C++ has no sums by index
            return 1.0
        triton = sum(map(self._triton_seconds, kernels.values()))
        of_operator = {self._case(kernel) for kernel in kernels.values()}
        cuda = sum(
            time.seconds
            for time in self.times
            if time.cuda and time.case in of_operator and _operator(time.kernel) == operator
        )
        return min(cuda / triton, 1.0) if cuda else 1.0


def _operator(kernel: str) -> str:
    """Return the operator to which a kernel in CUDA C++ belongs, by its name with template arguments."""
    name = kernel.partition("<")[0].removesuffix("_kernel")
    if name in ("loss", "gradient"):
        return "linear_cross_entropy_forward"
    return "attention_backward" if name in ("delta", "attention_keys", "attention_queries") else name


COLUMNS = (
    "operation | case | executed, of 790 | launches | GEMMs | own kernels | µs | TFLOP/s | others | of 790 TFLOP/s | "
    "consists of"
)

_ABOUT = (
    "Sums of what the code launches, which `trace.py` records: GEMMs at 790 TFLOP/s in whole waves of tiles, this "
    "project's kernels as above, all other operators at the bandwidth of a copy (at least {shortest:.0f} µs), and "
    "{gap:.0f} µs between kernels, as assumed of a CUDA graph; launched one by one, each takes the host about "
    "{eager:.0f} µs. None of these rates was measured. `fastest` takes the faster of Triton and CUDA C++ for each "
    "operator. **No option selects it: a model on a GPU runs Triton, and CUDA C++ runs where an operator is called "
    'with `implementation="cuda"`.** A step is one of BERT\'s base model with 32,768 tokens, dropout, 15 % masked '
    "tokens and AdamW, its parameters in fp32, which has an fp32 stream by default. TFLOP/s and their share of 790 are "
    "of the FLOP of `bertfast/training/flops.py`, by which published steps are compared: all layers on all tokens. The "
    "last layer computes the masked tokens only, so fewer are executed; `executed` is their share of 790 TFLOP/s. "
    "GEMMs, own kernels and others, which have the gaps, too, are in µs; so is what each row consists of, from 4 % on."
)


def section(times: Sequence[Time], found: Sequence[Workload], gpu: Gpu) -> list[str]:
    """Return the lines about all workloads: a table, and what the steps consist of."""
    about = _ABOUT.format(
        shortest=1e6 * constants.SHORTEST, gap=1e6 * constants.GRAPH_GAP, eager=1e6 * constants.HOST_LAUNCH
    )
    lines = ["", "## Operations of several kernels, and steps", "", about, "", f"| {COLUMNS} |"]
    lines.append("|---" * (COLUMNS.count("|") + 1) + "|")
    steps = {}
    for workload in found:
        for fastest in (False, True) if workload.name == STEP else (False,):
            prices = Prices(times, workload, fastest, gpu)
            lines.append("| " + " | ".join(row(prices, "fastest" if fastest else "Triton")) + " |")
            if workload.name == STEP and workload.stream == "fp32" and not fastest:
                steps[f"length {workload.length}"] = prices.parts()
    return [*lines, *breakdown(steps)]


def row(prices: Prices, kernels: str) -> list[str]:
    """Return the cells of a workload."""
    workload, parts = prices.workload, prices.parts()
    total = sum(part.seconds for part in parts)
    gemms = sum(part.seconds for part in parts if part.name == _GEMMS)
    own = sum(part.seconds for part in parts if part.own)
    rate = workload.flop / total
    return [
        workload.name,
        f"{workload.case}, {kernels}",
        f"{workload.executed / total / constants.GEMM_FLOPS:.0%}" if rate else "",
        f"{sum(part.launches for part in parts)}",
        f"{1e6 * gemms:.1f}",
        f"{1e6 * own:.1f}",
        f"{1e6 * total:.1f}",
        f"{rate / 1e12:.0f}" if rate else "",
        f"{1e6 * (total - gemms - own):.1f}",
        f"{rate / constants.GEMM_FLOPS:.0%}" if rate else "",
        prices.contents(parts),
    ]


def breakdown(steps: Mapping[str, Sequence[Part]], least: float = 0.002) -> list[str]:
    """Return the lines of a table of the parts of steps; those below the share `least` of all are summed."""
    names = list(dict.fromkeys(part.name for parts in steps.values() for part in parts))
    totals = {case: sum(part.seconds for part in parts) for case, parts in steps.items()}
    lines = ["", "What these steps consist of, with Triton's kernels and an fp32 stream, in µs (launches):", ""]
    lines.append("| part | " + " | ".join(steps) + " |")
    lines.append("|---" * (1 + len(steps)) + "|")
    rest = {case: [0, 0.0] for case in steps}
    for name in names:
        of_case = {case: [part for part in parts if part.name == name] for case, parts in steps.items()}
        sums = {
            case: (sum(part.launches for part in parts), sum(part.seconds for part in parts))
            for case, parts in of_case.items()
        }
        if all(seconds < least * totals[case] for case, (_, seconds) in sums.items()):
            for case, (launches, seconds) in sums.items():
                rest[case][0] += launches
                rest[case][1] += seconds
            continue
        lines.append(f"| {name} | " + " | ".join(_cell(*sums[case]) for case in steps) + " |")
    lines.append("| others | " + " | ".join(_cell(*rest[case]) for case in steps) + " |")
    return lines


def _cell(launches: float, seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}" + (f" ({launches:.0f})" if launches else "")
