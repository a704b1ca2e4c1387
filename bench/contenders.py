"""Everyone who computes a shape: eager, torch.compile, triton_norm, and other packages where they have an equivalent.

Each is a function of a shape that returns a layer in training mode, or raises ``Unsuitable``. Another package's kernel
takes the part that it covers; PyTorch does the rest, in place.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import Fused, Plain, build
from .shapes import Shape

EAGER, COMPILED, OURS = "eager", "compile", "triton_norm"


class Unsuitable(Exception):
    """Why a package has no equivalent of a shape."""


def eager(shape: Shape) -> nn.Module:
    return build(Plain, shape)


def ours(shape: Shape) -> nn.Module:
    return build(Fused, shape)


def compiled(shape: Shape) -> nn.Module:
    # Shapes are fixed here, and one shape must not inherit the graph that another one made dynamic.
    torch._dynamo.reset()
    return torch.compile(build(Plain, shape), dynamic=False)


def attorch(shape: Shape) -> nn.Module:
    import attorch

    if shape.kind != "batch" or shape.adaptive:
        raise Unsuitable("attorch has batch norm only")
    names = {None: None, "relu": "relu", "leaky_relu": f"leaky_relu_{shape.slope}"}

    class Layer(Plain):
        def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
            return self.norm(x, *residual)

    layer = build(Layer, shape)
    layer.norm = attorch.BatchNorm2d(shape.shape[1], act_func=names[shape.activation])
    return layer


def flag_gems(shape: Shape) -> nn.Module:
    import flag_gems

    if shape.kind != "instance" or shape.adaptive or not hasattr(flag_gems, "instance_norm"):
        raise Unsuitable("flag_gems has a differentiable function for instance norm only")

    class Norm(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x: Tensor) -> Tensor:
            return flag_gems.instance_norm(x, self.weight, self.bias, None, None, True, 0.1, self.eps)

    layer = build(Plain, shape)
    layer.norm = Norm(layer.norm)
    return layer


def _rows(shape: Shape, call: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> nn.Module:
    """A layer of rows by ``call(norm, x, *added)``, with the parameters of the layer's own norm."""

    class Layer(Plain):
        def forward(self, x: Tensor, *added: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return call(self.norm, x, *added)

    if shape.adaptive or shape.residual or shape.activation is not None:
        raise Unsuitable("a norm with an affine per column, or of a sum, is all there is")
    return build(Layer, shape)


def quack(shape: Shape) -> nn.Module:
    import quack

    if shape.kind != "rms":
        raise Unsuitable("quack has a differentiable RMS norm only")
    eps = torch.finfo(torch.float32).eps

    def call(norm: nn.Module, x: Tensor, *added: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        more = {"residual": added[0], "prenorm": True} if added else {}
        return quack.rmsnorm(x, norm.weight, eps=eps, **more)

    return _rows(shape, call)


def flash_attn(shape: Shape) -> nn.Module:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    if shape.kind not in ("layer", "rms"):
        raise Unsuitable("flash_attn has layer norm and RMS norm")
    is_rms = shape.kind == "rms"
    eps = torch.finfo(torch.float32).eps if is_rms else 1e-5

    def call(norm: nn.Module, x: Tensor, *added: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        more = {"residual": added[0], "prenorm": True} if added else {}
        return layer_norm_fn(x, norm.weight, None if is_rms else norm.bias, eps=eps, is_rms_norm=is_rms, **more)

    return _rows(shape, call)


def liger_kernel(shape: Shape) -> nn.Module:
    from liger_kernel.transformers.group_norm import LigerGroupNorm
    from liger_kernel.transformers.layer_norm import LigerLayerNorm
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    if shape.kind not in ("instance", "group", "layer", "rms") or not shape.affine or shape.adaptive:
        raise Unsuitable("liger_kernel has affine group norm, hence instance norm, layer norm and RMS norm")
    channels = shape.channels
    if shape.pre_residual:
        if shape.kind != "rms":
            raise Unsuitable("liger_kernel has RMS norm alone of a sum")
        from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

        layer = _rows(shape, lambda norm, x, added: norm(x, added))
        norm = LigerFusedAddRMSNorm(channels, eps=torch.finfo(torch.float32).eps)
        norm.load_state_dict(layer.norm.state_dict())
        layer.norm = norm
        return layer
    layer = build(Plain, shape)
    if shape.kind == "layer":
        norm = LigerLayerNorm(channels, eps=1e-5, bias=True)
    elif shape.kind == "rms":
        norm = LigerRMSNorm(channels, eps=torch.finfo(torch.float32).eps)
    else:
        # At one channel a group, group norm is instance norm.
        norm = LigerGroupNorm(channels, shape.groups if shape.kind == "group" else channels, eps=1e-5)
    norm.load_state_dict(layer.norm.state_dict())
    layer.norm = norm
    return layer


def apex(shape: Shape) -> nn.Module:
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    if shape.kind != "batch" or shape.adaptive or shape.layout != "channels_last" or shape.activation != "relu":
        raise Unsuitable("apex has batch norm + ReLU in channels_last only")

    class Layer(Plain):
        def forward(self, *inputs: Tensor) -> Tensor:
            return self.norm(*(t.permute(0, 2, 3, 1) for t in inputs)).permute(0, 3, 1, 2)

    layer = build(Layer, shape)
    layer.norm = BatchNorm2d_NHWC(shape.shape[1], fuse_relu=True)
    return layer


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "attorch": attorch, "flag_gems": flag_gems, "liger_kernel": liger_kernel, "apex": apex, "quack": quack,
    "flash_attn": flash_attn,
}  # fmt: skip


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def contenders(compile: bool, device: torch.device) -> dict[str, Callable[[Shape], nn.Module]]:
    """Who takes part here, eager first. Other packages run on GPUs only."""
    found = {EAGER: eager}
    if compile:
        found[COMPILED] = compiled
    found[OURS] = ours
    return found | {name: peer for name, peer in PEERS.items() if device.type == "cuda" and installed(name)}
