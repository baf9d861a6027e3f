"""The native library as a whole: threads, schemas and fake implementations, symbols, and broken files."""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import dropout_over, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bertfast
from bertfast import ops
from bertfast.ops import native
from bertfast.ops import packed_linear as ops_packed
from bertfast.ops.packed_linear import PackedWeight, pack, quantise
from bertfast.ops.sequences import Sequences

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")

with_library = pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON))


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, dtype=torch.float32, seed=index) for index, shape in enumerate(shapes)]


def attention(lengths: list[int]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        sequences = Sequences.from_lengths(lengths)
        (qkv,) = leaves((sequences.capacity, 3, 2, 32))
        return both_ways(ops.attention(qkv, sequences, dropout=dropout_over(sequences), implementation="cpu"), [qkv])

    return run


def both_ways(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and its gradients."""
    return [y.detach(), *torch.autograd.grad(y, inputs, normal(*y.shape, dtype=y.dtype, seed=9).detach())]


def both_ways_of_pair(pair: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return two outputs and the gradients of both together."""
    gradients = [normal(*y.shape, dtype=y.dtype, seed=9).detach() for y in pair]
    return [*(y.detach() for y in pair), *torch.autograd.grad(pair, inputs, gradients)]


def add_layer_norm() -> list[Tensor]:
    x = leaves((TOKENS, 96), (TOKENS, 96), (96,), (96,), (96,))
    return both_ways(ops.add_layer_norm(*x, 1e-12, DROPOUT, implementation="cpu"), x)


def add_layer_norm_pair() -> list[Tensor]:
    x = leaves((TOKENS, 96), (TOKENS, 96), (96,), (96,), (96,))
    pair = ops.add_layer_norm(*x, 1e-12, DROPOUT, compute_dtype=torch.bfloat16, implementation="cpu")
    return both_ways_of_pair(pair, x)


def bias_gelu() -> list[Tensor]:
    x = leaves((TOKENS, 96), (96,))
    return both_ways(ops.bias_gelu(*x, implementation="cpu"), x)


def gated_activation() -> list[Tensor]:
    x = leaves((TOKENS, 96), (96,))
    return both_ways(ops.gated_activation(x[0], "silu", x[1], implementation="cpu"), x)


def gated_activation_without_bias() -> list[Tensor]:
    (x,) = leaves((TOKENS, 96))
    return both_ways(ops.gated_activation(x, "gelu", implementation="cpu"), [x])


def pre_norm() -> list[Tensor]:
    x = leaves((TOKENS, 96), (TOKENS, 96), (96,), (96,), (96,))
    return both_ways_of_pair(ops.pre_norm(*x, 1e-12, DROPOUT, norm_dtype=torch.bfloat16, implementation="cpu"), x)


def pre_norm_alone() -> list[Tensor]:
    x, gamma = leaves((TOKENS, 96), (96,))
    normed = ops.pre_norm(None, x, None, gamma, None, 1e-12, rms=True, implementation="cpu")[1]
    return both_ways(normed, [x, gamma])


def gelu_layer_norm() -> list[Tensor]:
    x = leaves((TOKENS, 96), (96,), (96,), (96,))
    return both_ways(ops.gelu_layer_norm(*x, 1e-12, implementation="cpu"), x)


def embeddings() -> list[Tensor]:
    token = torch.arange(TOKENS)
    ids = token.square() % 599 % 40, token % 2, token % 50
    x = leaves((40, 96), (50, 96), (2, 96), (96,), (96,))
    return both_ways(ops.embeddings(*ids, *x, 1e-12, DROPOUT, implementation="cpu"), x)


def linear_cross_entropy() -> list[Tensor]:
    rows = torch.arange(TOKENS) * 7 % TOKENS
    x = leaves((TOKENS, 32), (1000, 32), (1000,))
    loss = ops.linear_cross_entropy(x[0], rows, *x[1:], rows % 1000, implementation="cpu")[0]
    y, *_, d_bias = both_ways(loss, x)
    return [y, d_bias]  # the other gradients are GEMMs of MKL, which on Intel CPUs splits sums among threads


def gather() -> list[Tensor]:
    (x,) = leaves((TOKENS, 96))
    return both_ways(ops.gather(torch.arange(TOKENS) * 7 % 90, x, implementation="cpu")[0], [x])


def rotary() -> list[Tensor]:
    (qkv,) = leaves((TOKENS, 3, 2, 40))
    table = normal(TOKENS, 40, dtype=torch.float32).detach()
    return both_ways(ops.rotary(qkv, table, implementation="cpu"), [qkv])


def packed_linear(pack_weight: Callable[..., PackedWeight]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        x, weight, bias = (each.detach() for each in leaves((TOKENS, 90), (70, 90), (70,)))
        return [ops_packed.packed_linear(x, pack_weight(weight, bias), "gelu", implementation="cpu")]

    return run


def packed_layer() -> list[Tensor]:
    shapes = ((192, 64), (64, 64), (96, 64), (64, 96))
    weights = [pack(*(each.detach() for each in leaves(shape, shape[:1]))) for shape in shapes]
    hidden, gamma, beta = (each.detach() for each in leaves((TOKENS, 64), (64,), (64,)))
    sequences = Sequences.from_lengths([300, 399], capacity=TOKENS)
    tensors, options = [tensor for weight in weights for tensor in weight.tensors], (2, 32, 96, 0.2, False, None)
    arguments = hidden, sequences.cu_seqlens, tensors, [gamma, beta] * 2, [1e-12, 1e-12], *options, "gelu"
    run = torch.ops.bertfast.cpu_packed_layer_forward
    return [run(*arguments, torch.float32, rows) for rows in (None, torch.arange(5) * 7)]


TOKENS = 700  # several parts of a loop over tokens, of different sizes
DROPOUT = dropout_over(Sequences.from_lengths([TOKENS]))
CASES = {
    "attention_long": attention([400]),
    "attention_short": attention([30, 0, 7, 1, 25] * 8),
    "add_layer_norm": add_layer_norm,
    "add_layer_norm_pair": add_layer_norm_pair,
    "bias_gelu": bias_gelu,
    "gated_activation": gated_activation,
    "gated_activation_without_bias": gated_activation_without_bias,
    "gelu_layer_norm": gelu_layer_norm,
    "packed_layer": packed_layer,
    "packed_linear": packed_linear(pack),
    "packed_linear_int8": packed_linear(quantise),
    "pre_norm": pre_norm,
    "pre_norm_alone": pre_norm_alone,
    "embeddings": embeddings,
    "gather": gather,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
}


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_library_is_available():
    assert native.UNAVAILABLE_REASON is None


@with_library
@pytest.mark.parametrize("case", CASES)
def test_results_are_bitwise_identical_for_any_number_of_threads(case):
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(CASES[case]())
    torch.set_num_threads(threads)
    for alone, *together in zip(*results, strict=True):
        assert all(torch.equal(alone, x) for x in together)


class Calls(TorchDispatchMode):
    """Record the calls of the library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}  # name: list of (operation, arguments)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "bertfast":
            plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
            self.calls.setdefault(function.overloadpacket.__name__, []).append((function, plain))
        return function(*arguments, **(keywords or {}))


@with_library
def test_every_operator_passes_opcheck():
    with Calls() as mode:
        for case in CASES.values():
            case()
    defined = {name.removeprefix("bertfast::") for name in torch._C._dispatch_get_all_op_names()}
    inner = {"cpu_cross_entropy"}  # a part of another
    assert set(mode.calls) | inner == {name for name in defined if name.startswith("cpu_")}
    for function, arguments in itertools.chain(*mode.calls.values()):
        torch.library.opcheck(function, arguments)


@with_library
def test_an_unsupported_instruction_set_is_refused():
    with pytest.raises(ValueError, match="must be one of plain, avx2, avx512, avx512_bf16, got 'sse'"):
        native.use_instruction_set("sse")
    missing = {"avx512", "avx512_bf16"} - set(native.instruction_sets())
    for name in missing:
        with pytest.raises(
            ValueError, match=f"this CPU does not support the instruction set '{name}'; '.*' stays in use"
        ):
            native.use_instruction_set(name)


def symbols(path: Path, *options: str) -> list[list[str]]:
    """Return the lines of `nm`, split into fields; the name is the last one."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    ran = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=2) for line in ran.stdout.splitlines()]


@with_library
def test_only_the_stable_abi_of_pytorch_is_used():
    """So a library that is built with one version of PyTorch works with later ones."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = "".join(
        (include / name).read_text() for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
    )  # functions later than 2.10 are between such lines
    headers = re.sub(
        r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_1[1-9].*?#endif // TORCH_FEATURE", "", headers, flags=re.DOTALL
    )
    stable = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", headers))
    undefined = symbols(native.path(), "-D", "--undefined-only")
    used = {name for *_, kind, name in undefined if kind == "U" and "@" not in name}  # the others are from the system
    assert "torch_call_dispatcher" in used
    assert {name for name in used if not name.startswith("Py")} <= stable


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
def test_objects_of_different_instruction_sets_share_no_symbol(name):
    """The linker keeps any one of several definitions of a function, so none may be in objects of two sets."""
    objects = sorted((ROOT / "build").glob(f"objects/*.{name}.o"))
    if not objects:
        pytest.skip("the library was not built here, or not for x86-64")
    for path in objects:
        shared = [symbol for _, kind, symbol in (["", *line][-3:] for line in symbols(path, "-C")) if kind in "WVu"]
        assert [symbol for symbol in shared if f"bertfast::{name}::" not in symbol] == [], path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_kernels_compile_for_aarch64(path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no cross compiler")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-ignored-attributes"]
    subprocess.run([compiler, *flags, "-fsyntax-only", "-DBERTFAST_SET=plain", path], check=True)


def truncated(library: bytes) -> bytes:
    return library[: len(library) // 2]


def empty(library: bytes) -> bytes:
    return b""


def of_another_torch(library: bytes) -> bytes:
    return library.replace(b"\0torch_call_dispatcher\0", b"\0torch_call_dispatchex\0")


@pytest.mark.slow
@with_library
@pytest.mark.parametrize("broken", [truncated, empty, of_another_torch])
def test_with_a_broken_file_a_warning_is_shown_and_the_reference_runs(broken, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    shutil.copytree(Path(bertfast.__file__).parent, tmp_path / "bertfast", ignore=ignored)
    if not (tmp_path / "bertfast" / "kernels").exists():
        shutil.copytree(ROOT / "kernels", tmp_path / "bertfast" / "kernels", ignore=ignored)
    library = native.path()
    (tmp_path / "bertfast" / library.name).write_bytes(broken(library.read_bytes()))
    code = "import torch, bertfast.ops as ops; x = torch.ones(2, 3); print(ops.bias_gelu(x, x[0]).sum().item())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(6 * 1.9545, abs=1e-3)
    (sentence,) = [line for line in ran.stderr.splitlines() if "RuntimeWarning" in line]
    assert "the native library does not load, install bertfast again (" in sentence
