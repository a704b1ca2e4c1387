"""Any call against the oracle: what is asked, shapes, dtypes and layouts are hypothesis's to choose.

A few dozen fixed examples by default; ``pytest tests/properties --hypothesis-profile=long`` goes on for an hour or so,
with new ones each time.
"""

import math

import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from oracle import BY_NAME, ROWS, TOLERANCES, Arguments, actual, arguments, expected
from torch import Tensor, nn

from triton_norm.activations import can_be_inverted, resolve

HALF = [torch.float16, torch.bfloat16]
KINDS = {"batch": (2, 5), "instance": (3, 5), "group": (2, 5), "channels": (3, 5), "layer": (1, 4), "rms": (1, 4)}
#: The oracle sends no gradient in near these corners.
CORNERS = [-3.0, -1.0, 0.0, 1.0, 3.0, 6.0]
NUMBERS = {
    nn.LeakyReLU: st.floats(-0.5, 1.5), nn.ELU: st.floats(-0.5, 3.0), nn.CELU: st.floats(0.25, 3.0),
    nn.Softplus: st.floats(0.5, 4.0),
}  # fmt: skip


@st.composite
def activations(draw, channels: int, dtype: torch.dtype, device: str) -> None | str | nn.Module:
    choice = draw(st.sampled_from([None, *BY_NAME, *NUMBERS, nn.Hardtanh, nn.PReLU]), label="activation")
    if choice is nn.PReLU:
        count = draw(st.sampled_from([1, channels]))
        return nn.PReLU(count, draw(st.floats(-0.5, 1.5)), dtype=dtype, device=device)
    if choice is nn.Hardtanh:
        low, high = sorted(draw(st.lists(st.sampled_from(CORNERS), min_size=2, max_size=2, unique=True)))
        return nn.Hardtanh(low, high)
    return choice(draw(NUMBERS[choice])) if choice in NUMBERS else choice


def laid_out(draw, t: Tensor | None) -> Tensor | None:
    """The same numbers: dims in another order in memory, with others between them and in front."""
    if t is None:
        return None
    order = draw(st.permutations(range(t.dim())))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=t.dim(), max_size=t.dim()))
    shift = draw(st.integers(0, 3))
    stored = [t.shape[d] * steps[d] for d in order]
    memory = t.new_zeros(shift + math.prod(stored))[shift:].view(stored)
    there = memory[tuple(slice(None, None, steps[d]) for d in order)]
    there.copy_(t.permute(order))
    return there.permute([order.index(d) for d in range(t.dim())])


@st.composite
def calls(draw, device: str) -> Arguments:
    kind = draw(st.sampled_from(list(KINDS)), label="kind")
    dims = draw(st.integers(*KINDS[kind]))
    shape = tuple(draw(st.lists(st.integers(1, 9 - dims), min_size=dims, max_size=dims)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, *HALF]), label="dtype")
    by_channel = kind not in (*ROWS, "channels")
    options, more = {}, {"eps": draw(st.sampled_from([1e-5, 1e-3, 0.5]))}
    if kind == "group":
        more["num_groups"] = draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    if kind in ROWS:
        more["normalized_shape"] = shape[draw(st.integers(0, dims - 1)) :]
    # Few numbers that are almost equal are divided by almost nothing, and so are their roundings.
    reduced = {
        "batch": math.prod(shape) // shape[min(1, dims - 1)], "instance": math.prod(shape[2:]),
        "group": math.prod(shape[1:]) // more.get("num_groups", 1), "channels": shape[min(1, dims - 1)],
    }.get(kind, math.prod(more.get("normalized_shape", ())))  # fmt: skip
    assume(reduced >= 6 or (kind == "channels" and reduced >= 5))
    affine = draw(st.sampled_from(["both", "weight", "bias", "none"]))
    if by_channel:
        options["form"] = draw(st.sampled_from(["channel", "channel", "sample", "element"]))
        more["unit_offset"] = draw(st.booleans())
        if kind != "group":
            options["statistics"] = draw(st.booleans())
            more["use_stats"] = not options["statistics"] or draw(st.booleans())
            more["momentum"] = draw(st.sampled_from([0.1, 0.0, 1.0]))
            more["unbiased"] = kind == "instance" and not options["statistics"] and draw(st.booleans())
    out = draw(st.sampled_from([None, None, torch.float32, torch.float16]), label="result")
    if dtype in HALF and draw(st.booleans()):
        options["parameter_dtype"] = torch.float32
    spatial = shape[2:]
    if (by_channel or (kind == "channels" and dims == 4)) and spatial and draw(st.booleans()):
        sides = [draw(st.integers(0, min(size - 1, 2))) for size in reversed(spatial) for _ in range(2)]
        more["padding"] = draw(st.sampled_from([tuple(sides), min(sides)]))
        more["padding_mode"] = draw(st.sampled_from(["reflect", "replicate", "circular", "zeros"]))
    channels = shape[1] if dims > 1 else 1
    a = arguments(
        kind, shape, dtype, device, affine, residual=draw(st.booleans()), seed=draw(st.integers(0, 2**16)),
        residual_dtype=draw(st.sampled_from([dtype, out or dtype])), out=out,
        activation=draw(activations(channels, dtype, device)), **options, **more,
    )  # fmt: skip
    name, numbers, slope = resolve(a.activation)
    plain = a.residual is None and a.padding == 0 and slope is None
    if plain and dtype not in HALF and can_be_inverted(name, numbers) and _is_far_from_zero(a.weight, a.bias):
        a.memory_efficient = draw(st.booleans(), label="memory_efficient")
    a.x, a.residual, a.weight, a.bias = (laid_out(draw, t) for t in (a.x, a.residual, a.weight, a.bias))
    return a


def _is_far_from_zero(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether what memory_efficient recovers is as exact as any other call."""
    least = 1.0 if weight is None else weight.abs().min().item()
    return least > 0.05 and (bias is None or bias.abs().max().item() < 20 * least)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, size: float, what: str) -> None:
    """Within a dtype's tolerance, which for less than ``size`` does not get narrower."""
    absolute, relative = TOLERANCES[dtype]
    error = (got.detach().cpu().double() - want).abs()
    worst = (error / (absolute * size + relative * want.abs())).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{what}: off by {worst:.3g} times what is allowed, at most {error.max().item():.3g}"


def check(a: Arguments, by_torch: bool) -> None:
    """As the oracle's own, but for shapes so small that sums may cancel: their terms are the measure then.

    Also of an element of x's gradient where torch's own functions round these terms to half precision; and behind them
    an activation makes more of what they rounded.
    """
    want, dy = expected(a)
    got = actual(a, dy)
    dtype, out = a.x.dtype, a.out or a.x.dtype
    narrow = [dtype, out]
    if a.activation in ("hardsigmoid", "celu") or isinstance(a.activation, nn.CELU):
        # torch's derivatives of these have constants in float32.
        narrow.append(torch.float32)
    narrow = max(narrow, key=lambda dtype: TOLERANCES[dtype])
    assert got.y.dtype == out and got.y.shape == want.y.shape
    steepest = a.activation.alpha if by_torch and isinstance(a.activation, nn.ELU) else 1.0
    close(got.y, want.y, narrow, max(1.0, steepest), "output")
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in got.gradients.items():
        true = want.gradients[name]
        assert gradient.shape == true.shape
        whole = name in ("x", "residual")
        size = max(1.0, true.abs().max().item(), 0.0 if whole else dy.double().norm().item())
        if name == "x" and by_torch and dtype in HALF and a.weight is not None:
            size = max(size, (dy.double().abs().max() * a.weight.double().abs().max()).item())
        close(gradient, true, narrow, size, f"gradient of {name}")
    for name in ("running_mean", "running_var"):
        if getattr(want, name) is not None:
            close(getattr(got, name), getattr(want, name), getattr(a, name).dtype, 1.0, name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
@given(data=st.data())
def test_any_call(backend, data):
    a = data.draw(calls(backend.device))
    for name, t in vars(a).items():
        note(f"{name}: {f'{tuple(t.shape)}, strides {t.stride()}, {t.dtype}' if isinstance(t, Tensor) else t}")
    check(a, backend.name == "torch")
