"""What two ranks do with fused networks under DistributedDataParallel and fully_shard, against a single process.

Each rank has its share of the batch; the single process takes the shares one after another and averages gradients.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import oracle
import plain
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_norm as tn

RANKS, STEPS = 2, 2
Waits = Callable[[nn.Module, bool], AbstractContextManager]


def at_once(model: nn.Module, waits: bool) -> AbstractContextManager:
    return nullcontext()


class Modules(nn.Module):
    """This package's modules: norms of both kinds of rows, a residual, a learned slope, both results of a padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tn.ConvNormAct(3, 8, 3, norm="group", activation=nn.PReLU(8), pad_output=1)
        self.second = tn.ConvNormAct(8, 8, 3, norm="instance", activation="silu")
        self.across = tn.LayerNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.rows = tn.RMSNorm(4, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        padded, skip = self.first(x, return_unpadded=True)
        y = self.across(self.second(padded), residual=skip)
        return self.rows(self.head(y.mean((2, 3))))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "modules":
        return Modules().double()
    return plain.ResnetGenerator(3, 3, 4, functools.partial(nn.InstanceNorm2d, affine=True), n_blocks=1).double()


def fused(model: nn.Module, **options) -> nn.Module:
    return model if isinstance(model, Modules) else tn.fuse(model, **options)


def shares(seed: int, parts: int = RANKS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * parts, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype).chunk(parts)


def loss_of(y: Tensor) -> Tensor:
    return y.double().sin().square().mean()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def single(model: nn.Module, parts: int = RANKS, around: Callable = nullcontext) -> Iterator[dict[str, Tensor]]:
    """The parameters after each step of a single process."""
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x in shares(step, parts):
            with around():
                loss = loss_of(model(x)) / RANKS
            loss.backward()
        optimizer.step()
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


def trains_like(
    name: str, wrap: Callable[[nn.Module], nn.Module], parts: int = 1, waits: Waits = at_once,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> None:  # fmt: skip
    """The same steps; of ``parts`` micro-batches a step all but the last in ``waits``, which does not synchronize."""
    wanted = list(single(network(name), parts * RANKS, around))
    model = wrap(network(name))
    optimizer, found = optimizer_of(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for i, x in enumerate(shares(step, parts * RANKS)[dist.get_rank() :: RANKS]):
            with waits(model, i < parts - 1):
                with around():
                    loss = loss_of(model(x))
                loss.backward()
        optimizer.step()
        found.append({name.removeprefix("module."): full(p.detach()).clone() for name, p in model.named_parameters()})
    for got, want in zip(found, wanted, strict=True):
        assert got.keys() == want.keys()
        for key, p in got.items():
            oracle.assert_close(p, want[key], torch.float64, key)
    assert any(not torch.equal(found[0][key], p) for key, p in network(name).named_parameters())


def ddp(model: nn.Module, **options) -> nn.Module:
    return DistributedDataParallel(fused(model), **options)


def channels_last(model: nn.Module) -> nn.Module:
    return ddp(model.to(memory_format=torch.channels_last), gradient_as_bucket_view=True, static_graph=True)


def whole(model: nn.Module, **options) -> nn.Module:
    return fully_shard(fused(model), **options)


def blocks(model: nn.Module, **options) -> nn.Module:
    """Sharded block by block, then fused: what was sharded keeps its forward."""
    for module in model.modules():
        if isinstance(module, (plain.ResnetBlock, tn.ConvNormAct)):
            fully_shard(module, **options)
    return fused(fully_shard(model, **options), inplace=True)


def no_sync(model: nn.Module, waits: bool) -> AbstractContextManager:
    return model.no_sync() if waits else nullcontext()


def unsynchronized(model: nn.Module, waits: bool) -> AbstractContextManager:
    model.set_requires_gradient_sync(not waits)
    return nullcontext()


def mixed(name: str, wrap: Callable) -> None:
    """Parameters and what is computed in bfloat16, gradients averaged in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reference = network(name).bfloat16()
    for x in shares(0, dtype=torch.bfloat16):
        (loss_of(reference(x)) / RANKS).backward()
    model = wrap(network(name).float(), mp_policy=policy)
    y = model(shares(0, dtype=torch.float32)[dist.get_rank()])
    loss_of(y).backward()
    found = {key: full(p.grad) for key, p in model.named_parameters()}
    assert y.dtype == torch.bfloat16
    close_gradients(found, reference)


def close_gradients(found: dict[str, Tensor], reference: nn.Module) -> None:
    for key, p in reference.named_parameters():
        assert found[key].dtype == torch.float32
        # Of a bias in front of a norm that subtracts the mean there is rounding alone.
        error, size = (found[key].double() - p.grad.double()).norm(), p.grad.double().norm()
        assert error <= 0.03 * size or size < 1e-3, f"{key}: {error} of {size}"


def synchronized() -> None:
    """With statistics of all ranks it is the whole batch that the network sees."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.ReflectionPad2d(1), nn.Conv2d(8, 4, 3)]
    reference = nn.Sequential(*layers, nn.BatchNorm2d(4)).double()
    model = tn.SyncBatchNorm.convert_sync_batchnorm(tn.fuse(copy.deepcopy(reference)))
    whole = fully_shard(model)
    wanted, found = [], []
    for model, take in ((reference, torch.cat), (whole, lambda parts: parts[dist.get_rank()])):
        optimizer = optimizer_of(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model(take(shares(step)))).backward()
            optimizer.step()
        state = {key: full(t).detach() for key, t in model.state_dict().items()}
        (wanted if model is reference else found).append(state)
    assert wanted[0].keys() == found[0].keys()
    for key, t in found[0].items():
        oracle.assert_close(t, wanted[0][key], torch.float64, key)


def mixed_synchronized() -> None:
    """Convolutions in bfloat16; norms, which want parameters like their running statistics, in float32."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.ReflectionPad2d(1), nn.Conv2d(8, 4, 3)]
    reference = nn.Sequential(*layers)
    model = tn.SyncBatchNorm.convert_sync_batchnorm(tn.fuse(copy.deepcopy(reference)))
    for layer in (reference[0], reference[4]):
        layer.bfloat16()
    loss_of(reference(torch.cat(shares(0, dtype=torch.bfloat16)))).backward()
    fully_shard(model[1])
    model = fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    y = model(shares(0, dtype=torch.float32)[dist.get_rank()])
    loss_of(y).backward()
    gradients = {key: full(p.grad) for key, p in model.named_parameters()}
    running = full(model[1].running_var)
    assert y.dtype == torch.bfloat16
    close_gradients(gradients, reference)
    oracle.assert_close(running, reference[1].running_var, torch.bfloat16)


def with_backend(name: str, case: Callable[[], None]) -> None:
    os.environ["TRITON_NORM_BACKEND"] = name
    case()


def _cases() -> dict[str, Callable[[], None]]:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    cases: dict[str, Callable[[], None]] = {"synchronized": synchronized, "mixed, synchronized": mixed_synchronized}
    for name in ("modules", "fused"):
        own = {
            "ddp": partial(trains_like, name, ddp),
            "ddp, channels_last": partial(trains_like, name, channels_last),
            "ddp, autocast": partial(trains_like, name, ddp, around=autocast),
            "ddp, accumulated": partial(trains_like, name, ddp, 2, no_sync),
            "fully_shard": partial(trains_like, name, whole),
            "fully_shard, blocks": partial(trains_like, name, blocks),
            "fully_shard, accumulated": partial(trains_like, name, blocks, 2, unsynchronized),
            "fully_shard, mixed": partial(mixed, name, whole),
            "fully_shard, mixed blocks": partial(mixed, name, blocks),
        }
        cases |= {f"{case}, {name}": run for case, run in own.items()}
    by_kernels = (
        "synchronized", "mixed, synchronized", "ddp, accumulated, modules", "ddp, channels_last, fused",
        "fully_shard, blocks, fused", "fully_shard, mixed blocks, modules",
    )  # fmt: skip
    both = {f"{case}, torch": partial(with_backend, "torch", run) for case, run in cases.items()}
    return both | {f"{case}, triton": partial(with_backend, "triton", cases[case]) for case in by_kernels}


CASES = _cases()
