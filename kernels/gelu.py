"""GELU inside kernels (Hendrycks and Gimpel, 2016): u · Φ(u), or u · σ(2 v), which is the tanh formula with v inside.

Either takes one exponential and one division, and its derivative the same two, so that memory and not arithmetic sets
the pace: the library's erf alone is more instructions than there is time for while a bf16 element comes and goes.
"""

import triton
import triton.language as tl

_HAS_RECIPROCAL = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter takes no PTX


@triton.jit
def gelu(u, APPROXIMATE: tl.constexpr):
    """GELU of fp32 `u`; APPROXIMATE is "none" or "tanh"."""
    if APPROXIMATE == "tanh":
        distribution, _ = _logistic(_doubled_argument(u))
    else:
        distribution, _ = _normal(u)
    return u * distribution


@triton.jit
def gelu_derivative(u, APPROXIMATE: tl.constexpr):
    """The derivative of `gelu`."""
    if APPROXIMATE == "tanh":
        distribution, density = _logistic(_doubled_argument(u))
        return distribution + u * density * (1.5957691216057308 + 0.2140644488178 * u * u)
    else:
        distribution, density = _normal(u)
        return distribution + u * density


@triton.jit
def _reciprocal(x):
    """1 / x of fp32 x >= 1, to an ulp in one instruction; a correctly rounded division takes nine and a branch."""
    if _HAS_RECIPROCAL:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _normal(u):
    """(Φ, φ) of the standard normal distribution at u, Φ to 7.5e-8 (Abramowitz and Stegun, 1964, formula 26.2.17)."""
    density = tl.exp2(-0.7213475204444817 * u * u - 1.3257480647361593)  # e^(-u² / 2) / sqrt(2 π)
    t = _reciprocal(1.0 + 0.2316419 * tl.abs(u))
    series = (((1.330274429 * t - 1.821255978) * t + 1.781477937) * t - 0.356563782) * t + 0.319381530
    tail = density * t * series
    return tl.where(u > 0, 1.0 - tail, tail), density


@triton.jit
def _logistic(x):
    """(σ, σ') of the logistic distribution at x, from its tail, which neither overflows nor cancels."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    tail = e * _reciprocal(1.0 + e)
    return tl.where(x > 0, 1.0 - tail, tail), tail * (1.0 - tail)


@triton.jit
def _doubled_argument(u):
    """2 v, where v = sqrt(2 / π) · (u + 0.044715 u³)."""
    return u * (1.5957691216057308 + 0.0713548162726 * u * u)
