"""Whole training steps: a CycleGAN generator with its discriminator, and ResNet-50 with mixed precision."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Factory
from .networks import Discriminator, Generator, ResNet50


class Step(NamedTuple):
    """``run`` does one step and returns its loss and the norm of its gradients."""

    size: tuple[int, ...]
    run: Callable[[], Tensor]


def _outcome(loss: Tensor, model: nn.Module) -> Tensor:
    norms = [p.grad.norm().float() for p in model.parameters()]
    return torch.stack([loss.detach().float(), torch.stack(norms).norm()])


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


Wrap = Callable[[nn.Module], nn.Module]


def cyclegan(factory: Factory, wrap: Wrap, device: torch.device, dtype: torch.dtype, small: bool) -> Step:
    """Least-squares GAN losses at batch 1 and 256 x 256: the generator's update, then the discriminator's."""
    width, blocks, size = (8, 2, 32) if small else (64, 9, 256)
    torch.manual_seed(0)
    generator, discriminator = Generator(factory, width, blocks).to(device), Discriminator(factory, width).to(device)
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.rand((1, 3, size, size), generator=draw).mul(2).sub(1).to(device) for _ in range(2))
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (generator, discriminator)]
    generate, judge = wrap(generator), wrap(discriminator)

    def loss_for(verdict: Tensor, wanted: float) -> Tensor:
        return F.mse_loss(verdict.float(), torch.full_like(verdict, wanted, dtype=torch.float32))

    def run() -> Tensor:
        discriminator.requires_grad_(False)
        with _autocast(device, dtype):
            fake = generate(source)
            loss = loss_for(judge(fake), 1.0)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)
        with _autocast(device, dtype):
            judged = loss_for(judge(target), 1.0) + loss_for(judge(fake.detach()), 0.0)
        optimizers[1].zero_grad()
        judged.backward()
        optimizers[1].step()
        return _outcome(loss, generator)

    return Step((1, 3, size, size), run)


def resnet50(factory: Factory, wrap: Wrap, device: torch.device, dtype: torch.dtype, small: bool) -> Step:
    """Cross entropy, channels_last, autocast. Without a loss scale: the step is timed, not trained to the end."""
    width, blocks, batch, size = (8, (1, 1, 1, 1), 2, 32) if small else (64, (3, 4, 6, 3), 128, 224)
    torch.manual_seed(0)
    model = ResNet50(factory, width, blocks).to(device, memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(1)
    images = torch.randn((batch, 3, size, size), generator=draw).to(device, memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), generator=draw).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    predict = wrap(model)

    def run() -> Tensor:
        with _autocast(device, dtype):
            loss = F.cross_entropy(predict(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return _outcome(loss, model)

    return Step((batch, 3, size, size), run)


#: Name, what makes the step, and the dtypes that it runs in (half precision by autocast).
STEPS = {
    "cyclegan-step": (cyclegan, ("float32", "bfloat16")),
    "resnet50-step": (resnet50, ("bfloat16",)),
}
