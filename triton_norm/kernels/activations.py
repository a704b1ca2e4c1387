"""Activations: a value and a derivative on the pre-activation z; ``triton_norm/activations.py`` has a row for each.

Both functions take ``(z, a, b)``: z in the accumulation dtype, a and b the activation's parameters (compile-time
numbers, or for PReLU the learnable slope as a tensor that broadcasts against z). Comparisons are written so that
NaN is passed on, and branches that are not taken never overflow.
"""

from . import tl, triton


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0, -t, t)


@triton.jit
def _log1p(e):
    # Kahan's correction: log(1 + e) keeps its relative accuracy when 1 + e rounds.
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _negative(z):
    return tl.where(z > 0, 0.0, z)


@triton.jit
def _fill(z, constant):
    # tl.where would round a bare constant to float32, also for float64 z.
    return tl.full(z.shape, constant, z.dtype)


@triton.jit
def identity(z, a, b):
    return z


@triton.jit
def one(z, a, b):
    return _fill(z, 1.0)


@triton.jit
def relu(z, a, b):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_derivative(z, a, b):
    return tl.where(z <= 0, 0.0, _fill(z, 1.0))


@triton.jit
def leaky_relu(z, a, b):
    return tl.where(z > 0, z, z * a)


@triton.jit
def leaky_relu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, _fill(z, 1.0) * a)


@triton.jit
def hardtanh(z, a, b):
    return tl.where(z < a, _fill(z, a), tl.where(z > b, _fill(z, b), z))


@triton.jit
def hardtanh_derivative(z, a, b):
    return tl.where((z <= a) | (z >= b), 0.0, _fill(z, 1.0))


@triton.jit
def elu(z, a, b):
    return tl.where(z > 0, z, (tl.exp(_negative(z)) - 1.0) * a)


@triton.jit
def elu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, tl.exp(_negative(z)) * a)


@triton.jit
def celu(z, a, b):
    return tl.where(z > 0, z, (tl.exp(_negative(z) / a) - 1.0) * a)


@triton.jit
def celu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, tl.exp(_negative(z) / a))


@triton.jit
def selu(z, a, b):
    return elu(z, 1.6732632423543772848170429916717, b) * 1.0507009873554804934193349852946


@triton.jit
def selu_derivative(z, a, b):
    return elu_derivative(z, 1.6732632423543772848170429916717, b) * 1.0507009873554804934193349852946


@triton.jit
def gelu(z, a, b):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865475244))


@triton.jit
def gelu_derivative(z, a, b):
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865475244))
    return cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014326779


@triton.jit
def gelu_tanh(z, a, b):
    return 0.5 * z * (1.0 + _tanh(z * (1.0 + z * z * 0.044715) * 0.7978845608028653559))


@triton.jit
def gelu_tanh_derivative(z, a, b):
    t = _tanh(z * (1.0 + z * z * 0.044715) * 0.7978845608028653559)
    slope = (1.0 + z * z * 0.134145) * 0.7978845608028653559
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope


@triton.jit
def silu(z, a, b):
    return z * _sigmoid(z)


@triton.jit
def silu_derivative(z, a, b):
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _tanh_softplus(z):
    # tanh(log(1 + e^z)) without the logarithm; beyond 20 it is 1 in float32 and within 1e-17 of it in float64.
    e = tl.exp(tl.where(z > 20.0, 20.0, z))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def mish(z, a, b):
    return z * _tanh_softplus(z)


@triton.jit
def mish_derivative(z, a, b):
    t = _tanh_softplus(z)
    return t + z * _sigmoid(z) * (1.0 - t * t)


@triton.jit
def softplus(z, a, b):
    scaled = z * a
    soft = (tl.where(scaled > 0, scaled, 0.0) + _log1p(tl.exp(-tl.abs(scaled)))) / a
    return tl.where(scaled > b, z, soft)


@triton.jit
def softplus_derivative(z, a, b):
    return tl.where(z * a > b, 1.0, _sigmoid(z * a))


@triton.jit
def sigmoid(z, a, b):
    return _sigmoid(z)


@triton.jit
def sigmoid_derivative(z, a, b):
    s = _sigmoid(z)
    return s * (1.0 - s)


@triton.jit
def logsigmoid(z, a, b):
    return _negative(z) - _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def logsigmoid_derivative(z, a, b):
    return _sigmoid(-z)


@triton.jit
def tanh(z, a, b):
    return _tanh(z)


@triton.jit
def tanh_derivative(z, a, b):
    t = _tanh(z)
    return 1.0 - t * t


@triton.jit
def hardswish(z, a, b):
    return z * hardtanh(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardswish_derivative(z, a, b):
    return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z / 3.0 + 0.5))


@triton.jit
def hardsigmoid(z, a, b):
    return hardtanh(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardsigmoid_derivative(z, a, b):
    return hardtanh_derivative(z, -3.0, 3.0) / 6.0


@triton.jit
def softsign(z, a, b):
    return z / (1.0 + tl.abs(z))


@triton.jit
def softsign_derivative(z, a, b):
    d = 1.0 + tl.abs(z)
    return 1.0 / (d * d)
