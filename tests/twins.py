"""Compares a model with its plain PyTorch twin in float64: three training steps, evaluation, state; and operators."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm as tn
from triton_norm.fusion.report import FuseReport

TOLERANCE = {"atol": 1e-9, "rtol": 1e-7}


def normal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Apply(nn.Module):
    """Layers as attributes, and a forward given as a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.__dict__["function"] = forward

    def forward(self, x):
        return self.function(self, x)


class ApplyTwo(Apply):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.function(self, x, y)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, with parameters and running statistics that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(
                1 + 0.3 * noise if p.dim() == 1 and name.endswith("weight") else noise / max(1, p[0].numel()) ** 0.5
            )
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model


def check(ours: nn.Module, theirs: nn.Module, *inputs: torch.Tensor, steps: int = 3, parameters: bool = True) -> None:
    """Outputs and all gradients in ``steps`` SGD steps, then evaluation and the whole state, running statistics too."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.double().load_state_dict(theirs.state_dict())
    models = (ours, theirs)
    for model in models:
        model.train()
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) if parameters else None for m in models]
    for step in range(steps):
        outputs, gradients = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)  # for dropout
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = model(*(x * 1.0 for x in leaves))
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(step), dtype=y.dtype)
            model.zero_grad()
            (y * direction).sum().backward()
            outputs.append(y.detach())
            gradients.append([x.grad for x in leaves] + [p.grad for p in model.parameters()])
            if optimizer is not None:
                for p in (p for p in model.parameters() if p.grad is not None):
                    # Steps of one size keep the twins comparable, however steep the network.
                    p.grad /= p.grad.norm() + 1.0
                optimizer.step()
        torch.testing.assert_close(*outputs, **TOLERANCE)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for model in models:
        model.eval()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), **TOLERANCE)
    theirs.load_state_dict(ours.state_dict())


def fused(model: nn.Module, way: str, *inputs: torch.Tensor, steps: int = 2) -> FuseReport:
    """The report of the model, fused one way and checked against a copy of itself.

    ``way`` is "fuse", or who compiles what the backend leaves.
    """
    randomize(model)
    reference = copy.deepcopy(model)
    if way == "fuse":
        model = tn.fuse(model)
    else:
        model.compile(backend="triton_norm", options={"rest": way})
    check(model, reference, *inputs, steps=steps, parameters=any(True for _ in model.parameters()))
    return tn.fuse_report(model)


class Operators(TorchDispatchMode):
    """The aten operators that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def separate(self):
        """Those that pad, add or activate."""
        kinds = ("pad", "aten::add", "relu", "threshold")
        return [name for name in self.names if name.startswith("aten::") and any(kind in name for kind in kinds)]
