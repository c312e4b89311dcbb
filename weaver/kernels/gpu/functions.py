"""Functions that the kernels share: block products, and activations with their derivatives."""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, accumulator, UPCAST: tl.constexpr):
    """``accumulator + left right`` in float32, without TF32.

    UPCAST is for the interpreter, which multiplies the raw bits of bfloat16.
    """
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)`` of a float32 block, as in ``weaver.algorithms.glu.ACTIVATIONS``.

    gelu_tanh: ``0.5 x (1 + tanh(z))`` is ``x sigmoid(2 z)``, z = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(x, 0.0)


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """``act'(x)`` of a float32 block; 0 at 0 for relu, as torch has it."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return s + x * s * (1.0 - s) * slope
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x > 0.0, 1.0, 0.0)
