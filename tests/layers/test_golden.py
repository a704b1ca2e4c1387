"""Printed examples, hand-written loops, and torch's mean and variance, on the modules."""

import pytest
import torch
from oracle import assert_close

import triton_norm as tn

# fmt: off
TRAIN_INPUT = [
    [[[0.5408, 0.2707, -0.4395], [0.7942, -1.3403, 0.9146]],
     [[0.0082, 0.3639, -0.1986], [1.6522, -0.3494, -0.8619]],
     [[0.1021, 0.2455, 0.9168], [-0.2652, 0.0869, -1.3121]]],
    [[[-0.5038, -1.0989, 1.382], [1.5612, -0.0384, -1.5507]],
     [[-0.4546, 2.5124, -1.1012], [1.0045, -0.7018, 1.3485]],
     [[-2.7837, -0.6371, -0.7099], [-0.0732, 1.1424, 0.6456]]],
]
TRAIN_OUTPUT = [
    [[[0.4995, 0.2295, -0.4802], [0.7527, -1.3803, 0.873]],
     [[-0.2414, 0.0885, -0.4332], [1.2832, -0.573, -1.0483]],
     [[0.3156, 0.456, 1.1133], [-0.0441, 0.3006, -1.0692]]],
    [[[-0.5444, -1.139, 1.34], [1.5191, -0.0794, -1.5906]],
     [[-0.6706, 2.0809, -1.2702], [0.6825, -0.8999, 1.0016]],
     [[-2.5102, -0.4082, -0.4795], [0.1439, 1.3342, 0.8478]]],
]
# fmt: on
SQUARE = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
REFLECTED = [
    [8, 7, 6, 7, 8, 7, 6],
    [5, 4, 3, 4, 5, 4, 3],
    [2, 1, 0, 1, 2, 1, 0],
    [5, 4, 3, 4, 5, 4, 3],
    [8, 7, 6, 7, 8, 7, 6],
    [5, 4, 3, 4, 5, 4, 3],
    [2, 1, 0, 1, 2, 1, 0],
]
REPLICATED = [
    [0, 0, 0, 1, 2, 2, 2],
    [0, 0, 0, 1, 2, 2, 2],
    [0, 0, 0, 1, 2, 2, 2],
    [3, 3, 3, 4, 5, 5, 5],
    [6, 6, 6, 7, 8, 8, 8],
    [6, 6, 6, 7, 8, 8, 8],
    [6, 6, 6, 7, 8, 8, 8],
]
LINE = [[-3, -2, -1], [0, 1, 2], [3, 4, 5]]
RELU = [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
SIGMOID = [[0.0474, 0.1192, 0.2689], [0.5, 0.7311, 0.8808], [0.9526, 0.982, 0.9933]]


@pytest.mark.parametrize("affine", [True, False])
def test_printed_batch_norm(backend, affine):
    x = torch.tensor(TRAIN_INPUT, device=backend.device)
    y = tn.BatchNorm2d(3, affine=affine, device=backend.device)(x)
    # Printed to four decimals.
    torch.testing.assert_close(y.cpu(), torch.tensor(TRAIN_OUTPUT), atol=2e-4, rtol=0)


def identity_norm(backend, **fused):
    """Evaluation with mean 0 and variance 1: only the fused parts are left."""
    return tn.BatchNorm2d(1, eps=1e-12, affine=False, device=backend.device, **fused).eval()


@pytest.mark.parametrize("mode, printed", [("reflect", REFLECTED), ("replicate", REPLICATED)])
def test_printed_padding(backend, mode, printed):
    x = torch.tensor(SQUARE, device=backend.device, dtype=torch.float32)[None, None]
    y = identity_norm(backend, padding=2, padding_mode=mode)(x)
    assert_close(y[0, 0], torch.tensor(printed), torch.float32)


@pytest.mark.parametrize("activation, printed", [("relu", RELU), ("sigmoid", SIGMOID)])
def test_printed_activation(backend, activation, printed):
    x = torch.tensor(LINE, device=backend.device, dtype=torch.float32)[None, None]
    y = identity_norm(backend, activation=activation)(x)
    torch.testing.assert_close(y[0, 0].cpu(), torch.tensor(printed, dtype=torch.float32), atol=6e-5, rtol=0)


def normalized(values, eps):
    """A list of numbers with mean 0 and variance 1."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / (variance + eps) ** 0.5 for v in values]


def test_instance_norm_by_hand(backend):
    x = torch.randint(0, 10, (2, 3, 5), generator=torch.Generator().manual_seed(0)).float()
    want = [[normalized(channel, 1e-5) for channel in sample] for sample in x.tolist()]
    assert_close(tn.InstanceNorm1d(3)(x.to(backend.device)), torch.tensor(want), torch.float32)


def test_batch_norm_by_hand(backend):
    x = torch.randn(128, 3, 512, generator=torch.Generator().manual_seed(0))
    want = torch.empty_like(x)
    for c in range(3):
        values = normalized([v for sample in x[:, c].tolist() for v in sample], 1e-5)
        want[:, c] = torch.tensor(values).view(128, 512)
    assert_close(tn.BatchNorm1d(3, device=backend.device)(x.to(backend.device)), want, torch.float32)


@pytest.mark.parametrize("name, dims", [("BatchNorm2d", (0, 2, 3)), ("InstanceNorm2d", (2, 3))])
def test_mean_and_variance(backend, name, dims):
    x = torch.randn(3, 5, 6, 2, generator=torch.Generator().manual_seed(0))
    mean = torch.mean(x, dims, keepdim=True)
    variance = torch.var(x, dims, unbiased=False, keepdim=True)
    y = getattr(tn, name)(5, device=backend.device)(x.to(backend.device))
    assert_close(y, (x - mean) / torch.sqrt(variance + 1e-5), torch.float32)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_running_statistics(backend, name):
    """Mean and unbiased variance, averaged over the samples for instance norm, move the old ones by the momentum."""
    x = torch.randn(3, 5, 6, 2, generator=torch.Generator().manual_seed(0)) + 2
    module = getattr(tn, name)(5, momentum=0.2, track_running_stats=True, device=backend.device)
    module(x.to(backend.device))
    dims = (0, 2, 3) if name == "BatchNorm2d" else (2, 3)
    mean, variance = torch.mean(x, dims), torch.var(x, dims, unbiased=True)
    if name == "InstanceNorm2d":
        mean, variance = mean.mean(0), variance.mean(0)
    assert_close(module.running_mean, 0.2 * mean, torch.float32)
    assert_close(module.running_var, 0.8 + 0.2 * variance, torch.float32)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_image_batch(backend, name):
    """Channels of images have mean 0 and variance 1 afterwards, whatever their brightness and contrast."""
    x = torch.rand(2, 3, 256, 512, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.5, 20.0, 1.0]).view(3, 1, 1) + torch.tensor([0.1, -7.0, 100.0]).view(3, 1, 1)
    dims = (0, 2, 3) if name == "BatchNorm2d" else (2, 3)
    wide = x.double()
    want = (wide - wide.mean(dims, keepdim=True)) / (wide.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    # 100 +- 0.3 in float32 leaves five digits of the deviation.
    y = getattr(tn, name)(3, device=backend.device)(x.to(backend.device)).cpu().double()
    torch.testing.assert_close(y, want, atol=1e-4, rtol=0)
