"""Bytes and launches, counted in the interpreter: what the package is for."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime.interpreter import GridExecutor

import triton_norm as tn
from bench.counting import counting
from triton_norm.cli.counting import cpu_launches
from triton_norm.launching import devices
from triton_norm.ops import call as calls
from triton_norm.tuning.plan import Device

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(module, shape, layout="NCHW", residual=False, also=()):
    """(bytes per element, launches) forward and backward of a half-precision training step.

    ``also`` are the shapes of further arguments, such as a scale and a shift.
    """
    x = torch.randn(shape).half().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    more = [torch.randn(other).half() for other in also]
    more = [t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in more]
    r = torch.randn_like(x).requires_grad_() if residual else None
    with counting() as forward:
        y = module(x, *(t.requires_grad_() for t in more), residual=r)
    dy = torch.randn_like(y)
    with counting() as backward:
        y.backward(dy)
    return [(count.bytes / x.numel(), len(count.launches)) for count in (forward, backward)]


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 128])
def test_instance_norm_reads_once_and_writes_once(size, layout):
    module = tn.InstanceNorm2d(8, affine=True, activation="relu")
    (forward, launches), (backward, backward_launches) = measure(module, (128 // size, 8, size, size), layout)
    assert forward <= 4.2 and launches == 1
    assert backward <= 6.3 and backward_launches <= 2


@pytest.mark.parametrize("asked", ["dtype", "autocast"])
def test_half_in_and_float32_out_is_one_pass(asked, monkeypatch, anew):
    """2 bytes read and 4 written; 2 + 4 read and 2 written. No copy of x in float32, which would be 6 more."""
    x = torch.randn(2, 8, 64, 64).half().requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    if asked == "autocast":
        monkeypatch.setattr(calls, "_runs_in_float32", lambda kind, device: torch.is_autocast_enabled(device))
        anew()
    copies = []
    monkeypatch.setattr(Tensor, "float", lambda t: copies.append(t) or t.to(torch.float32))
    with counting() as forward, torch.autocast("cpu", torch.bfloat16, enabled=asked == "autocast"):
        y = tn.functional.group_norm(
            x, 2, weight, bias, activation="silu", dtype=torch.float32 if asked == "dtype" else None
        )
    assert y.dtype == torch.float32 and not copies
    with counting() as backward:
        y.backward(torch.randn_like(y))
    assert x.grad.dtype == torch.float16
    assert forward.bytes / x.numel() <= 6.2 and len(forward.launches) == 1
    assert backward.bytes / x.numel() <= 8.5 and len(backward.launches) <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 128])
def test_residual(size, layout):
    module = tn.InstanceNorm2d(8, affine=True, activation="relu")
    (forward, launches), (backward, backward_launches) = measure(
        module, (128 // size, 8, size, size), layout, residual=True
    )
    assert forward <= 6.3 and launches == 1
    assert backward <= 8.6 and backward_launches <= 2


def test_without_parameters_the_backward_is_one_launch():
    _, (backward, launches) = measure(tn.InstanceNorm2d(8, activation="relu"), (2, 8, 64, 64), "NCHW")
    assert backward <= 6.3 and launches == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 4, 64, 64), (2, 8, 112, 112)])
def test_batch_norm(shape, layout):
    module = tn.BatchNorm2d(shape[1], activation="relu")
    (forward, launches), (backward, backward_launches) = measure(module, shape, layout)
    assert forward <= 6.3 and launches <= 3
    assert backward <= 10.5 and backward_launches <= 3


def test_batch_norm_as_a_large_gpu_splits_it(monkeypatch, anew):
    """More programs share a row than one program combines on its own: partial results are summed by a launch."""
    monkeypatch.setattr(devices, "device", lambda index: Device())
    anew()
    module = tn.BatchNorm2d(32, activation="relu")
    (forward, launches), (backward, backward_launches) = measure(
        module, (8, 32, 56, 56), "channels_last", residual=True
    )
    # So few rows are split in small parts, for there to be enough programs; each part has statistics to write.
    assert forward <= 8.5 and launches <= 3
    assert backward <= 12.7 and backward_launches <= 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm(layout):
    module = tn.GroupNorm(32, 64, activation="silu")
    (forward, launches), (backward, backward_launches) = measure(module, (2, 64, 32, 32), layout)
    assert forward <= 4.2 and launches == 1
    assert backward <= 6.4 and backward_launches <= 2


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", [tn.LayerNorm, tn.RMSNorm])
def test_rows(norm, parameters, rows):
    """The affine is read, and its gradients are written, once for many rows and not once for each."""
    (forward, launches), (backward, backward_launches) = measure(norm(4096).to(parameters), (rows, 4096))
    assert forward <= 4 + 8.1 / rows * parameters.itemsize / 4 + 0.01 and launches == 1
    # A single program writes the gradients themselves, and no parts that would have to be summed.
    assert backward <= 6 + 16.1 / rows * parameters.itemsize / 4 + 0.01 and backward_launches == 1
    if rows == 64:
        assert forward <= 4.2 and backward <= 6.4


def test_rows_as_a_large_gpu_walks_them(monkeypatch, anew):
    monkeypatch.setattr(devices, "device", lambda index: Device(multiprocessors=2))
    anew()
    (forward, launches), (backward, backward_launches) = measure(tn.LayerNorm(1024), (512, 1024))
    assert forward <= 4.2 and launches == 1
    assert backward <= 6.4 and backward_launches == 2


def measured(call, leaves, upstream):
    """(bytes per element of the first leaf, launches) forward and backward."""
    with counting() as forward:
        results = call()
    with counting() as backward:
        torch.autograd.grad(results, leaves, upstream)
    return [(count.bytes / leaves[0].numel(), len(count.launches)) for count in (forward, backward)]


@pytest.mark.parametrize("norm, rows", [(tn.LayerNorm, 128), (tn.RMSNorm, 64)])
def test_a_sum_is_added_kept_and_differentiated_by_the_way(norm, rows, monkeypatch, anew):
    """Two read and two written; backward the sum and both gradients read, and one written that serves both addends."""
    if rows > 64:
        # Several programs, whose shares of the parameters' gradients are summed by a launch.
        monkeypatch.setattr(devices, "device", lambda index: Device(multiprocessors=1))
        anew()
    module = norm(4096).half()
    x, r, dy, dsum = (torch.randn(rows, 4096).half() for _ in range(4))
    leaves = [x.requires_grad_(), r.requires_grad_(), *module.parameters()]
    (forward, launches), (backward, backward_launches) = measured(
        lambda: module(x, pre_residual=r, return_sum=True), leaves, (dy, dsum)
    )
    assert 8 <= forward <= 8.5 and launches == 1
    assert 8 <= backward <= 8.7 and backward_launches == (2 if rows > 64 else 1)


def test_the_sum_is_not_written_where_nobody_asks_for_it():
    x, r = (torch.randn(64, 1024).half() for _ in range(2))
    with torch.no_grad(), counting() as count:
        tn.RMSNorm(1024).half()(x, pre_residual=r)
    assert 6 <= count.bytes / x.numel() <= 6.2


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_scale_and_shift_for_each_sample_or_token(norm):
    """A sample's cost no bytes per element; a token's are read once, and their gradients written once."""
    x, dy = (torch.randn(2, 128, 1024).half() for _ in range(2))
    for leading, more in (((2, 1), 0), ((2, 128), 1)):
        scale, shift = (torch.randn(*leading, 1024).half().requires_grad_() for _ in range(2))
        affine = [scale] if norm == "rms_norm" else [scale, shift]
        (forward, launches), (backward, backward_launches) = measured(
            lambda affine=affine: getattr(tn.functional, norm)(x, (1024,), *affine, unit_offset=True),
            [x.requires_grad_(), *affine], dy,
        )  # fmt: skip
        assert forward <= 4.2 + 2 * more * len(affine) and launches == 1
        assert backward <= 6.4 + 4 * more * len(affine) and backward_launches <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_over_channels(layout):
    (forward, launches), (backward, backward_launches) = measure(tn.LayerNorm2d(128), (2, 128, 16, 32), layout)
    assert forward <= 4.2 and launches == 1
    assert backward <= 6.4 and backward_launches <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm, shape", [("instance", (2, 8, 64, 64)), ("batch", (2, 8, 32, 32))])
def test_spade(norm, shape, layout):
    """x, gamma and beta are read once and y is written once; backward x, dy and gamma, and three gradients."""
    for activation, beta in (("relu", 1 / 8), ("silu", 2)):
        module = tn.SPADE2d(8, norm, activation=activation)
        (forward, launches), (backward, _) = measure(module, shape, layout, also=(shape, shape))
        assert forward <= 8.4 and launches <= 2
        assert backward <= 12.2 + beta


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adaptive_instance_norm(layout):
    """As plain instance norm."""
    module = tn.AdaIN2d(8, activation="relu")
    (forward, launches), (backward, backward_launches) = measure(module, (2, 8, 64, 64), layout, also=((2, 8), (2, 8)))
    assert forward <= 4.2 and launches == 1
    assert backward <= 6.3 and backward_launches <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conditional_batch_norm(layout):
    """As plain batch norm that is split, with a launch to weigh the planes' sums."""
    module = tn.ConditionalBatchNorm2d(8, 3, activation="relu")
    x = torch.randn(4, 8, 64, 64).half().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    with counting() as forward:
        y = module(x, torch.tensor([0, 1, 2, 1]))
    dy = torch.randn_like(y)
    with counting() as backward:
        y.backward(dy)
    assert forward.bytes / x.numel() <= 6.3 and len(forward.launches) == 3
    assert backward.bytes / x.numel() <= 10.5 and len(backward.launches) <= 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_padding_writes_once_and_reads_its_border_again(mode, layout):
    module = tn.InstanceNorm2d(4, affine=True, activation="relu", padding=1, padding_mode=mode)
    (forward, launches), (backward, backward_launches) = measure(module, (1, 4, 64, 64), layout)
    frame = 66 * 66 / 64 / 64
    # The counter knows no cache, but where x is read again it has just been read.
    again = 0 if mode == "zeros" else 2 * (frame - 1)
    assert forward <= 2 + 2 * frame + again + 0.02 and launches == 1
    assert backward <= 4 + 2 * frame + 0.02 and backward_launches <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_batch_norm_is_a_copy(layout):
    """Read x and write y: exactly twice the element size, but for the parameters of each tile's rows."""
    module = tn.BatchNorm2d(8, activation="relu").eval()
    x = torch.randn(2, 8, 64, 64).half().contiguous(memory_format=LAYOUTS[layout])
    with counting() as count, torch.no_grad():
        module(x)
    assert len(count.launches) == 1
    assert 4 <= count.bytes / x.numel() < 4.05


def test_no_bits_where_no_gradient_is_taken():
    x = torch.randn(2, 8, 64, 64).half()
    with counting() as count, torch.no_grad():
        tn.InstanceNorm2d(8, activation="relu")(x, residual=x)
    assert 6 <= count.bytes / x.numel() < 6.05


def test_the_counter_counts_a_copy():
    """The counter itself: float32 in, float16 parameters, one row per sample and channel."""
    module = tn.InstanceNorm2d(2).float()
    x = torch.randn(1, 2, 16, 16)
    with counting() as count:
        module(x)
    (launch,) = count.launches
    assert launch.kernel == "persistent_forward"
    assert launch.read == x.numel() * 4
    assert launch.written == x.numel() * 4 + 2 * 2 * 4


#: A layer, the shape of its input, and how many kernels a training step launches: forward, and backward.
LAUNCHES = {
    "batch": (lambda: tn.BatchNorm2d(8, activation="relu"), (4, 8, 8, 8), (1, 1)),
    "batch, residual": (lambda: tn.BatchNorm2d(8, activation="relu"), (4, 8, 8, 8), (1, 1)),
    "batch, cumulative": (lambda: tn.BatchNorm2d(8, momentum=None), (4, 8, 8, 8), (1, 1)),
    "instance of one": (lambda: tn.InstanceNorm2d(8, affine=True, activation="relu"), (1, 8, 8, 8), (1, 1)),
    "instance of two": (lambda: tn.InstanceNorm2d(8, affine=True, activation="relu"), (2, 8, 8, 8), (1, 2)),
    "instance, no affine": (lambda: tn.InstanceNorm2d(8, activation="relu"), (2, 8, 8, 8), (1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_training_step(name, layout):
    """Seen by a dispatch mode, which takes another way, or by nobody."""
    make, shape, expected = LAUNCHES[name]
    module = make()
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if "residual" in name else None
    leaves = [x, *module.parameters(), *([] if residual is None else [residual])]
    y, forward = cpu_launches(lambda: module(x, residual=residual), interpreted=True)
    dy = torch.randn_like(y)
    _, backward = cpu_launches(lambda: torch.autograd.grad(y, leaves, dy), interpreted=True)
    assert (len(forward.operators), len(forward.triton)) == (0, expected[0])
    assert (len(backward.operators), len(backward.triton)) == (0, expected[1])
    with counting() as count:
        y = module(x, residual=residual)
    with counting() as again:
        torch.autograd.grad(y, leaves, dy)
    assert (len(count.launches), len(again.launches)) == expected


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_operator_beside_the_launches(name, monkeypatch):
    """Nothing but what counts the batches that a cumulative average is one of."""
    make, shape, _ = LAUNCHES[name]
    module, x = make(), torch.randn(shape, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if "residual" in name else None
    leaves, dy = [x, *module.parameters(), *([] if residual is None else [residual])], torch.randn_like(x)
    # The interpreter itself uses operators.
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.autograd.grad(module(x, residual=residual), leaves, dy)
            # That it is seen at all.
            x.detach().exp()
    operators = {event.name.removeprefix("aten::") for event in profiler.events() if event.name.startswith("aten::")}
    assert operators - {"detach"} == {"exp"} | ({"add_"} if "cumulative" in name else set())
