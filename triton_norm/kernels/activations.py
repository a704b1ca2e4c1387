"""Activations: a value and a derivative on the pre-activation z; ``triton_norm/activations.py`` has a row for each.

Both functions take ``(z, a, b)``: z in the accumulation dtype, a and b the activation's parameters (compile-time
numbers, or for PReLU the learnable slope as a tensor that broadcasts against z). Comparisons are written so that
NaN is passed on, and branches that are not taken never overflow.

Inverses take ``(y, a, b, least)``, with ``least`` the distance from an asymptote below which y has rounded to it.
"""

from . import tl, triton


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _expm1(x):
    """exp(x) - 1, right to a few roundings also where that is small."""
    if x.dtype == tl.float64:
        # Kahan's correction, as below.
        u = tl.exp(x)
        rounded = (u == 1.0) | (tl.abs(x) > 1.0)
        return tl.where(u == 1.0, x, (u - 1.0) * tl.where(rounded, 1.0, x / tl.log(tl.where(rounded, 2.0, u))))
    else:
        # The polynomial of least relative error, 9e-8, up to 1/4; beyond, the subtraction costs two bits.
        small = x + x * x * (((0.008335940 * x + 0.04177419) * x + 0.1666671) * x + 0.4999984)
        return tl.where(tl.abs(x) < 0.25, small, tl.exp(x) - 1.0)


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
def identity_inverse(y, a, b, least):
    return y


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
def leaky_relu_inverse(y, a, b, least):
    return tl.where(y > 0, y, y / a)


@triton.jit
def hardtanh(z, a, b):
    return tl.where(z < a, _fill(z, a), tl.where(z > b, _fill(z, b), z))


@triton.jit
def hardtanh_derivative(z, a, b):
    return tl.where((z <= a) | (z >= b), 0.0, _fill(z, 1.0))


@triton.jit
def elu(z, a, b):
    return tl.where(z > 0, z, _expm1(_negative(z)) * a)


@triton.jit
def elu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, tl.exp(_negative(z)) * a)


@triton.jit
def _log1p_of_negative(x, least):
    # log(1 + x) for x from -1 to 0, by the same correction.
    u = 1.0 + tl.where(x < least - 1.0, least - 1.0, x)
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def elu_inverse(y, a, b, least):
    return tl.where(y > 0, y, _log1p_of_negative(_negative(y) / a, least))


@triton.jit
def celu(z, a, b):
    return tl.where(z > 0, z, _expm1(_negative(z) / a) * a)


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
def _gelu_gate(z):
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    return _sigmoid(z * (1.0 + z * z * 0.044715) * 1.5957691216057307)


@triton.jit
def gelu_tanh(z, a, b):
    return z * _gelu_gate(z)


@triton.jit
def gelu_tanh_derivative(z, a, b):
    s = _gelu_gate(z)
    return s * (1.0 + z * (1.0 - s) * (1.0 + z * z * 0.134145) * 1.5957691216057307)


@triton.jit
def silu(z, a, b):
    return z * _sigmoid(z)


@triton.jit
def silu_derivative(z, a, b):
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _exp_up_to_20(z):
    # Mish's gate, tanh(log(1 + e^z)), is n / (n + 2) with n = e^z (e^z + 2): 1 beyond 20, within 1e-17.
    return tl.exp(tl.where(z > 20.0, 20.0, z))


@triton.jit
def mish(z, a, b):
    e = _exp_up_to_20(z)
    n = e * (e + 2.0)
    return z * (n / (n + 2.0))


@triton.jit
def mish_derivative(z, a, b):
    # gate + z gate'. Not by 1 - gate², which a gate that is a rounding off 1 would leave to be multiplied by a large z.
    e = _exp_up_to_20(z)
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    return r * (n + z * (4.0 * e * (e + 1.0) * r))


@triton.jit
def softplus(z, a, b):
    scaled = z * a
    soft = (tl.where(scaled > 0, scaled, 0.0) + _log1p(tl.exp(-tl.abs(scaled)))) / a
    return tl.where(scaled > b, z, soft)


@triton.jit
def softplus_derivative(z, a, b):
    return tl.where(z * a > b, 1.0, _sigmoid(z * a))


@triton.jit
def softplus_inverse(y, a, b, least):
    # log(exp(s) - 1) = s + log(1 - exp(-s))
    s = y * a
    s = tl.where(s < least, least, s)
    return tl.where(s > b, y, (s + tl.log(-_expm1(-s))) / a)


@triton.jit
def sigmoid(z, a, b):
    return _sigmoid(z)


@triton.jit
def sigmoid_derivative(z, a, b):
    # Not s (1 - s), of which nothing is left where s rounds to 1.
    e = tl.exp(-tl.abs(z))
    d = 1.0 + e
    return e / (d * d)


@triton.jit
def logsigmoid(z, a, b):
    return _negative(z) - _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def logsigmoid_derivative(z, a, b):
    return _sigmoid(-z)


@triton.jit
def tanh(z, a, b):
    m = _expm1(-2.0 * tl.abs(z))
    t = m / (m + 2.0)
    return tl.where(z < 0, t, -t)


@triton.jit
def tanh_derivative(z, a, b):
    return 4.0 * sigmoid_derivative(2.0 * z, a, b)


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
