"""A few steps of GAN training on real pixels, fused and plain, with the same start and the same patches."""

import functools
from pathlib import Path

import matplotlib
import matplotlib.image
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_norm as tn

STEPS = 16


@functools.cache
def photo():
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return torch.from_numpy(matplotlib.image.imread(path).copy()).permute(2, 0, 1).float() / 127.5 - 1


def patches(count, size, generator):
    """``count`` random patches of matplotlib's photograph, in [-1, 1]."""
    height, width = photo().shape[1:]
    corners = [
        [int(torch.randint(end - size, (), generator=generator)) for end in (height, width)] for _ in range(count)
    ]
    return torch.stack([photo()[:, y : y + size, x : x + size] for y, x in corners])


def train(generator, discriminator):
    """Colours a grey patch, least-squares GAN and L1: the three losses of every step."""
    random = torch.Generator().manual_seed(0)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.999)) for m in (generator, discriminator)]
    losses = []
    pool = patches(4, 32, random)
    for _ in range(STEPS):
        real = pool[torch.randperm(len(pool), generator=random)[:2]]
        grey = real.mean(1, keepdim=True)
        fake = generator(grey)
        scores = discriminator(fake)
        adversarial, l1 = F.mse_loss(scores, torch.ones_like(scores)), F.l1_loss(fake, real)
        optimizers[0].zero_grad()
        (adversarial + 10 * l1).backward()
        optimizers[0].step()
        right, wrong = discriminator(real), discriminator(fake.detach())
        loss = 0.5 * (F.mse_loss(right, torch.ones_like(right)) + F.mse_loss(wrong, torch.zeros_like(wrong)))
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        losses.append([adversarial.item(), l1.item(), loss.item()])
    return torch.tensor(losses)


def networks(home, seed=0):
    torch.manual_seed(seed)
    norm = functools.partial(nn.InstanceNorm2d, affine=True)
    generator = home.ResnetGenerator(1, 3, 8, norm, n_blocks=2)
    return generator, home.NLayerDiscriminator(3, 8, norm_layer=nn.BatchNorm2d)


@pytest.fixture(scope="module")
def plain_run():
    start = networks(plain)
    state = [{k: v.clone() for k, v in m.state_dict().items()} for m in start]
    return state, train(*start)


@pytest.mark.parametrize("how", ["networks", "fused"])
def test_follows_plain_pytorch(how, plain_run, monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    state, want = plain_run
    models = networks(tn.models, seed=1) if how == "networks" else [tn.fuse(m) for m in networks(plain, seed=1)]
    for model, start in zip(models, state, strict=True):
        model.load_state_dict(start)
    losses = train(*models)
    torch.testing.assert_close(losses, want, rtol=1e-3, atol=1e-4)
    # Something is learnt, so there is something to follow.
    assert want[-3:, 1].mean() < 0.9 * want[:3, 1].mean()


def test_another_start_does_not_follow(plain_run):
    """So that the test above can fail."""
    losses = train(*networks(plain, seed=1))
    assert not torch.allclose(losses, plain_run[1], rtol=1e-3, atol=1e-4)
