"""Activations inside kernels: GELU (Hendrycks and Gimpel, 2016) and SiLU, u · σ(u).

GELU is u · Φ(u), or u · σ(2 v), which is the tanh formula with v = sqrt(2 / π) · (u + 0.044715 u³) inside.
Each takes one exponential and one division, which the derivative shares, so that the kernels are bound by memory
bandwidth: the library's erf alone takes more instructions than the load and store of a bf16 element leave time for.
"""

import triton
import triton.language as tl

_HAS_RECIPROCAL = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter does not run PTX


@triton.jit
def gelu(u, APPROXIMATE: tl.constexpr):
    """Return GELU of fp32 `u`; APPROXIMATE is "none" or "tanh"."""
    distribution, _ = _gelu_distribution(u, APPROXIMATE)
    return u * distribution


@triton.jit
def gelu_derivative(u, APPROXIMATE: tl.constexpr):
    """Return the derivative of `gelu` at `u`."""
    distribution, density = _gelu_distribution(u, APPROXIMATE)
    return distribution + u * density


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """Return an activation of fp32 `u` and its derivative; ACTIVATION is "gelu", "gelu_tanh" or "silu"."""
    if ACTIVATION == "silu":
        distribution, density = _logistic(u)
    elif ACTIVATION == "gelu_tanh":
        distribution, density = _gelu_distribution(u, "tanh")
    else:
        distribution, density = _gelu_distribution(u, "none")
    return u * distribution, distribution + u * density


@triton.jit
def _gelu_distribution(u, APPROXIMATE: tl.constexpr):
    """Return the factor of u in GELU and the derivative of that factor."""
    if APPROXIMATE == "tanh":
        distribution, density = _logistic(u * (1.5957691216057308 + 0.0713548162726 * u * u))  # 2 v
        return distribution, density * (1.5957691216057308 + 0.2140644488178 * u * u)
    else:
        return _normal(u)


@triton.jit
def _reciprocal(x):
    """Return 1 / x of fp32 x >= 1, to 1 ulp in one instruction; correctly rounded division takes nine and a branch."""
    if _HAS_RECIPROCAL:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _normal(u):
    """Return Φ and φ of the standard normal at u, Φ to 7.5e-8 (Abramowitz and Stegun, 1964, formula 26.2.17)."""
    density = tl.exp2(-0.7213475204444817 * u * u - 1.3257480647361593)  # e^(-u² / 2) / sqrt(2 π)
    t = _reciprocal(1.0 + 0.2316419 * tl.abs(u))
    series = (((1.330274429 * t - 1.821255978) * t + 1.781477937) * t - 0.356563782) * t + 0.319381530
    tail = density * t * series
    return tl.where(u > 0, 1.0 - tail, tail), density


@triton.jit
def _logistic(x):
    """Return (σ, σ') of the logistic distribution at x, from its tail, which neither overflows nor cancels."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    tail = e * _reciprocal(1.0 + e)
    return tl.where(x > 0, 1.0 - tail, tail), tail * (1.0 - tail)
