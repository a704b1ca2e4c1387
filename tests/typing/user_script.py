"""What users write with the public names, for a type checker: it is checked and run, see test_types.py."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import triton_norm as tn
import triton_norm.functional as F
from triton_norm.types import ActivationLike, PaddingMode

x = torch.randn(2, 4, 8, 8)
rows = torch.randn(2, 5, 16)
pad: PaddingMode = "replicate"
act: ActivationLike = nn.LeakyReLU(0.2)

# Results without pairs are tensors.
loss: Tensor = tn.InstanceNorm2d(4)(x).sum() + F.instance_norm(x).sum()
loss += tn.BatchNorm2d(4, activation=act, padding=1, padding_mode=pad)(x, residual=None).mean()
loss += tn.GroupNorm(2, 4, activation="silu")(x, residual=x, activation=None).mean()
loss += tn.LayerNorm(16, activation="gelu")(rows, pre_residual=rows).mean() + tn.RMSNorm(16)(rows).mean()
loss += tn.LayerNorm2d(4)(x, padding=(1, 1, 0, 0)).mean() + tn.SyncBatchNorm(4)(x).mean()
loss += tn.AdaIN2d(4)(x, x[:, :, 0, 0], x[:, :, 0, 0]).mean() + tn.SPADE2d(4, "instance")(x, x, x).mean()
loss += tn.ConditionalBatchNorm2d(4, 3)(x, torch.tensor([0, 2])).mean()
loss += tn.BatchNorm1d(4, memory_efficient=True)(x[:, :, 0]).mean() + tn.BatchNorm3d(4)(x[..., None]).mean()
loss += F.batch_norm(x, None, None, training=True, activation="relu").mean() + F.group_norm(x, 2, dtype=x.dtype).mean()
loss += F.layer_norm(rows, (16,), unit_offset=True).mean() + F.rms_norm(rows, [16]).mean()
loss.backward() if loss.requires_grad else None

# With pairs they are pairs.
padded, plain = tn.BatchNorm2d(4, padding=1)(x, return_unpadded=True)
assert_type(padded, Tensor)
y, stream = tn.LayerNorm(16)(rows, pre_residual=rows, return_sum=True)
assert_type(stream, Tensor)
assert_type(F.instance_norm(x, padding=1, return_unpadded=True), tuple[Tensor, Tensor])
assert_type(F.rms_norm(rows, (16,), return_sum=True), tuple[Tensor, Tensor])


def either(pairs: bool) -> None:
    assert_type(F.group_norm(x, 2, padding=1, return_unpadded=pairs), Tensor | tuple[Tensor, Tensor])
    assert_type(tn.GroupNorm(2, 4)(x, return_unpadded=pairs), Tensor | tuple[Tensor, Tensor])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = tn.ConvNormAct(4, 8, 3, padding=1, norm="group", activation="silu", pad_output=1)
        self.norm = tn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        padded, skip = self.block(x, return_unpadded=True)
        return self.norm(padded).mean() + skip.mean()


either(True)
fused = tn.fuse(Net())
assert_type(fused, Net)
assert_type(fused.block(x), Tensor)
report: str = str(tn.fuse_report(fused))
generator = tn.models.ResnetGenerator(3, 3, ngf=8, norm_layer=nn.InstanceNorm2d, n_blocks=1)
assert_type(tn.models.resnet18(3, 10), tn.models.ResNet)
with tn.autotune.mode("0", budget=1.0):
    print(tn.autotune.path().name, fused(x).item(), generator(torch.randn(1, 3, 16, 16)).shape)
