"""What three ranks do with synchronized batch norms, against one batch norm of the whole batch in float64."""

import copy
import os
from collections.abc import Callable
from functools import partial

import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import triton_norm as tn

CHANNELS = 4
SPATIAL = (5, 8)


def part(whole: Tensor | None, sizes: tuple[int, ...], dim: int = 0) -> Tensor | None:
    """This rank's samples."""
    return None if whole is None else whole.split(sizes, dim)[dist.get_rank()]


def total(t: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' t added up, in float64."""
    t = t.detach().double().contiguous()
    dist.all_reduce(t, group=group)
    return t


def matches(
    sizes: tuple[int, ...] = (2, 2, 2), group: dist.ProcessGroup | None = None, layout: str | None = None,
    spatial: tuple[int, ...] = SPATIAL, **arguments,
) -> None:  # fmt: skip
    """Output, gradients and running statistics."""
    shape = (sum(sizes), CHANNELS, *spatial)
    a = oracle.arguments("batch", shape, statistics=True, **arguments)
    want, dy = oracle.expected(a)
    if dist.get_rank() >= len(sizes):
        return
    lay = oracle.LAYOUTS[layout] if layout else lambda x: x
    x, residual = (None if t is None else lay(part(t, sizes)).detach().requires_grad_() for t in (a.x, a.residual))
    by_channel = {name: p is not None and p.dim() == 1 for name, p in (("weight", a.weight), ("bias", a.bias))}
    weight, bias = (
        p if p is None else (p if p.dim() == 1 else part(p, sizes)).clone().requires_grad_() for p in (a.weight, a.bias)
    )
    norm = tn.SyncBatchNorm(
        CHANNELS, affine=False, momentum=a.momentum, process_group=group, activation=copy.deepcopy(a.activation),
        padding=a.padding, padding_mode=a.padding_mode, dtype=a.running_mean.dtype,
    )  # fmt: skip
    norm.running_mean, norm.running_var = a.running_mean.clone(), a.running_var.clone()
    y = norm(x, residual, weight=weight, bias=bias, unit_offset=a.unit_offset)
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    if isinstance(a.activation, nn.PReLU):
        leaves["slope"] = norm.activation.weight
    leaves = {name: t for name, t in leaves.items() if t is not None}
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), part(dy, sizes)), strict=True))
    whole = {name: total(g, group) for name, g in gradients.items() if name == "slope" or by_channel.get(name, False)}
    # From here on everybody is alone.
    assert y.dtype == x.dtype
    if layout:
        assert y.is_contiguous(memory_format=torch.channels_last)
    oracle.assert_close(y, part(want.y, sizes), a.x.dtype, "output")
    assert gradients.keys() == want.gradients.keys()
    for name, expected in want.gradients.items():
        if name in whole:
            assert gradients[name].dtype == leaves[name].dtype
            oracle.assert_close_as_vectors(whole[name], expected, a.x.dtype, name)
        else:
            oracle.assert_close(gradients[name], part(expected, sizes), a.x.dtype, name)
    for name in ("running_mean", "running_var"):
        oracle.assert_close(getattr(norm, name), getattr(want, name), a.running_mean.dtype, name)
    assert norm.num_batches_tracked == 1


def twins(name: str = "BatchNorm2d", **options) -> tuple[nn.Module, nn.Module]:
    """A synchronized norm, and what it is to be for the whole batch."""
    theirs = oracle.torchs(name, CHANNELS, dtype=torch.float64, **options)
    ours = tn.SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 0.3]))
            theirs.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 1.0]))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(seed: int, n: int = 6, mean: float = 0.4) -> Tensor:
    return torch.randn(n, CHANNELS, *SPATIAL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def same_state(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    for name, t in ours.state_dict().items():
        oracle.assert_close(t, theirs.state_dict()[name], dtype, name)


def several_batches(momentum: float | None) -> None:
    """Batches of changing shares, then evaluation, which is every rank's own."""
    ours, theirs = twins(momentum=momentum)
    pairs = []
    for seed, sizes in enumerate([(2, 2, 2), (0, 1, 5), (4, 1, 1)]):
        x = batch(seed)
        pairs.append((ours(part(x, sizes)), part(theirs(x), sizes)))
    if dist.get_rank() == 1:
        pairs.append((ours.eval()(x), theirs.eval()(x)))
    for y, want in pairs:
        oracle.assert_close(y, want, torch.float64)
    assert theirs.num_batches_tracked == 3
    same_state(ours, theirs)


def untracked() -> None:
    """Without running statistics evaluation takes those of its input: of the rank's own, as in torch's."""
    ours, theirs = twins(track_running_stats=False, affine=False)
    x = batch(0)
    y, want = ours(part(x, (1, 2, 3))), part(theirs(x), (1, 2, 3))
    alone = ours.eval()(part(x, (1, 2, 3)))
    oracle.assert_close(y, want, torch.float64)
    oracle.assert_close(alone, theirs.eval()(part(x, (1, 2, 3))), torch.float64)


def large_mean() -> None:
    """The variance is taken about the mean, and across ranks about everybody's."""
    ours, theirs = twins(momentum=1.0)
    x = batch(0, mean=1e4)
    x += torch.arange(6)[:, None, None, None] * 100
    ours.float()(part(x, (1, 4, 1)).float())
    theirs(x.float().double())
    assert ((ours.running_var / theirs.running_var - 1).abs() < 1e-5).all()
    assert ((ours.running_mean / theirs.running_mean - 1).abs() < 1e-6).all()


def nothing_at_all() -> None:
    """No rank has a sample, and then all have one number in all: nothing to learn from."""
    ours, _ = twins()
    before = copy.deepcopy(ours.state_dict())
    x = batch(0)[:0].requires_grad_()
    y = ours(x)
    y.sum().backward()
    one = ours(batch(0)[: dist.get_rank() == 1, :, :1, :1])
    assert y.shape == x.shape == x.grad.shape
    assert torch.isfinite(one).all()
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(ours, name), before[name])


def gradients_of_gradients() -> None:
    """Gradients of a penalty on gradients, of what they depend on: samples, maps and parameters."""
    ours, theirs = twins()
    x, w = batch(0), batch(1)
    sizes = (1, 3, 2)

    def second(norm: nn.Module, x: Tensor, w: Tensor, gathers: bool) -> list[Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = F.softplus(norm(x) + w) if isinstance(norm, nn.BatchNorm2d) else norm(x, w)
        (first,) = torch.autograd.grad((y * w).square().sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum() + y.sin().sum(), (x, w, norm.weight, norm.bias))
        return [*found[:2], *(total(g) if gathers else g for g in found[2:])]

    ours.activation = "softplus"
    got, want = second(ours, part(x, sizes), part(w, sizes), True), second(theirs, x, w, False)
    for g, expected in zip(got[:2], want[:2], strict=True):
        oracle.assert_close(g, part(expected, sizes), torch.float64)
    for g, expected in zip(got[2:], want[2:], strict=True):
        oracle.assert_close(g, expected, torch.float64)


def only_some_gradients() -> None:
    """Of the input alone, of parameters alone, of the residual alone, and none."""
    ours, theirs = twins()
    x, r, sizes = batch(0), batch(1), (1, 2, 3)
    pairs = []
    for wanted in ([0], [1], [2], [3], [1, 3]):
        found = []
        for norm, give in ((ours, partial(part, sizes=sizes)), (theirs, torch.clone)):
            leaves = [give(x).clone().requires_grad_(0 in wanted), *norm.parameters(), give(r).clone()]
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i in wanted)
            y = norm(leaves[0], leaves[3]) if norm is ours else norm(leaves[0]) + leaves[3]
            found.append(torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted]))
        for i, got, want in zip(wanted, *found, strict=True):
            pairs.append((total(got), want) if i in (1, 2) else (got, part(want, sizes)))
    with torch.no_grad():
        pairs.append((ours(part(x, sizes)), part(theirs(x), sizes)))
    for got, want in pairs:
        oracle.assert_close(got, want, torch.float64)


def forwards_before_backward() -> None:
    """Of a discriminator: of two batches, one of them checkpointed, which counts it twice, as torch does."""
    ours, theirs = twins()
    x, r, sizes = batch(0), batch(1), (1, 2, 3)
    pairs = []
    for norm, give in ((ours, partial(part, sizes=sizes)), (theirs, torch.clone)):
        leaves = [give(x).requires_grad_(), give(r).requires_grad_()]
        first = checkpoint(norm, leaves[0], use_reentrant=False)
        (first.sin().sum() + norm(leaves[1]).cos().sum()).backward()
        pairs.append([leaf.grad for leaf in leaves])
    for got, want in zip(*pairs, strict=True):
        oracle.assert_close(got, part(want, sizes), torch.float64)
    assert theirs.num_batches_tracked == 3
    same_state(ours, theirs)


def windows() -> None:
    """Inputs that lie in memory in ways that no kernel walks."""
    ours, theirs = twins("BatchNorm3d")
    volume = torch.randn(6, 6, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window, sizes = volume[:, 1:-1, 1:-1, 1:-2, 2:-1], (1, 2, 3)
    pairs = []
    for norm, give in ((ours, partial(part, sizes=sizes)), (theirs, torch.Tensor.contiguous)):
        leaf = give(window).detach().requires_grad_()
        y = norm(leaf)
        pairs.append((y, *torch.autograd.grad(y.sin().sum(), leaf)))
    for got, want in zip(*pairs, strict=True):
        oracle.assert_close(got, part(want, sizes), torch.float64)


def spade() -> None:
    ours = tn.SPADE2d(CHANNELS, "syncbatch", activation="leaky_relu", padding=1, dtype=torch.float64)
    theirs = nn.BatchNorm2d(CHANNELS, affine=False, dtype=torch.float64)
    whole = [batch(seed).requires_grad_() for seed in range(3)]
    sizes = (3, 0, 3)
    own = [part(t, sizes).detach().requires_grad_() for t in whole]
    y = ours(*own)
    want = F.pad(F.leaky_relu(theirs(whole[0]) * (1 + whole[1]) + whole[2]), (1, 1, 1, 1), "reflect")
    got = torch.autograd.grad(y.sin().sum(), own)
    oracle.assert_close(y, part(want, sizes), torch.float64)
    for g, expected in zip(got, torch.autograd.grad(want.sin().sum(), whole), strict=True):
        oracle.assert_close(g, part(expected, sizes), torch.float64)
    same_state(ours.norm, theirs)


def converted() -> None:
    """A network with what is fused in its norms, one of them conditional, and both results of a padded one."""
    torch.manual_seed(0)
    first = tn.BatchNorm2d(CHANNELS, activation=nn.PReLU(CHANNELS), padding=1)
    second = tn.ConditionalBatchNorm2d(CHANNELS, 3, activation="silu")
    theirs = nn.ModuleList([first, nn.Conv2d(CHANNELS, CHANNELS, 3), second]).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.rand_like(p))
    ours = tn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(theirs))
    labels, sizes, x = torch.tensor([0, 1, 2, 2, 1, 0]), (1, 2, 3), batch(0)

    def run(model: nn.ModuleList, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        padded, plain = model[0](x, return_unpadded=True)
        y = model[2](model[1](padded), labels, plain)
        y.sin().sum().backward()
        return y, {name: p.grad for name, p in model.named_parameters()}

    y, gradients = run(ours, part(x, sizes), part(labels, sizes))
    gradients = {name: total(g) for name, g in gradients.items()}
    want, expected = run(theirs, x, labels)
    oracle.assert_close(y, part(want, sizes), torch.float64)
    for name, g in gradients.items():
        oracle.assert_close(g, expected[name], torch.float64, name)
    same_state(ours, theirs)


def compiled(backend: str) -> None:
    """In one graph, two steps, the last with another share of the batch."""
    torch._dynamo.reset()
    ours, theirs = twins(momentum=None)
    ours.activation = "softplus"
    step = torch.compile(ours, backend=backend, fullgraph=True)
    pairs = []
    for seed, sizes in enumerate([(2, 2, 2), (1, 2, 3)]):
        x, r = batch(seed), batch(7)
        leaf, whole = part(x, sizes).clone().requires_grad_(), x.clone().requires_grad_()
        ours.zero_grad(), theirs.zero_grad()
        y, want = step(leaf, part(r, sizes)), F.softplus(theirs(whole) + r)
        y.sin().sum().backward(), want.sin().sum().backward()
        pairs += [(y, part(want, sizes)), (leaf.grad, part(whole.grad, sizes))]
        pairs += [(total(a.grad), b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    for got, want in pairs:
        oracle.assert_close(got, want, torch.float64)
    same_state(ours, theirs)


def errors() -> None:
    """Before anything is sent: nobody waits for a rank that raised."""
    norm = tn.SyncBatchNorm(CHANNELS)
    before = copy.deepcopy(norm.state_dict())
    x = batch(0).float()
    wrong = [
        (x[:, :3], {}), (x.long(), {}), (x[0, 0, 0], {}), (x, {"residual": x[:1]}),
        (x, {"activation": nn.PReLU(7)}), (x, {"padding": 9}), (x, {"weight": x[0]}),
    ]  # fmt: skip
    raised = []
    for input, fused in wrong if dist.get_rank() == 0 else []:
        try:
            norm(input, **fused)
        except (ValueError, RuntimeError) as error:
            raised.append(error)
    y = tn.BatchNorm2d(CHANNELS)(x)
    got = norm(part(x, (1, 2, 3)))
    assert dist.get_rank() != 0 or len(raised) == len(wrong)
    oracle.assert_close(got, part(y, (1, 2, 3)), torch.float32)
    assert norm.num_batches_tracked == 1 and not torch.equal(norm.running_mean, before["running_mean"])


def alone() -> None:
    """In a group of one rank, and in none, it is a batch norm."""
    groups = [dist.new_group([rank]) for rank in range(3)]
    x = batch(dist.get_rank())
    for group in groups:
        norm, theirs = twins()
        norm.process_group = group
        oracle.assert_close(norm(x), theirs(x), torch.float64)
        same_state(norm, theirs)


def with_backend(name: str, case: Callable[[], None]) -> None:
    os.environ["TRITON_NORM_BACKEND"] = name
    case()


def _cases() -> dict[str, Callable[[], None]]:
    two = dist.new_group([0, 1]) if dist.is_initialized() else None
    half = {"dtype": torch.float16, "parameter_dtype": torch.float32}
    cases = {
        "even": partial(matches, activation="relu"),
        "uneven": partial(matches, (1, 4, 1), activation="gelu"),
        "one number a rank": partial(matches, (1, 1, 1), spatial=()),
        "an empty rank": partial(matches, (2, 0, 4), residual=True, activation="relu", padding=1),
        "an empty rank per sample": partial(matches, (2, 0, 4), form="sample", activation="relu"),
        "two ranks": partial(matches, (4, 2), two, residual=True, activation="silu"),
        "two ranks, one empty": partial(matches, (0, 2), two, activation=nn.PReLU(), residual=True),
        "sequences": partial(matches, (2, 1, 3), spatial=(7,), activation="elu", padding=(2, 1)),
        "volumes": partial(
            matches, (2, 1, 1), spatial=(2, 3, 4), activation="relu", padding=1, padding_mode="replicate"
        ),
        "channels_last": partial(matches, (1, 2, 3), layout="channels_last", residual=True, activation="relu"),
        "channels_last, padded": partial(
            matches,
            (1, 2, 3),
            layout="channels_last",
            residual=True,
            activation=nn.PReLU(CHANNELS),
            padding=(1, 2, 0, 1),
        ),
        "no affine": partial(matches, (1, 2, 3), affine="none"),
        "weight alone": partial(matches, (1, 2, 3), affine="weight", activation="tanh"),
        "bias alone": partial(matches, (1, 2, 3), affine="bias", residual=True, activation="hardtanh", padding=1),
        "per sample": partial(matches, (1, 2, 3), form="sample", residual=True, activation="relu"),
        "per sample, padded": partial(matches, (1, 2, 3), form="sample", activation=nn.PReLU(CHANNELS), padding=1),
        "per element": partial(matches, (1, 2, 3), form="element", activation="relu", unit_offset=True),
        "per element, padded": partial(matches, (1, 2, 3), form="element", activation=nn.PReLU(), padding=1),
        "float16": partial(matches, (1, 2, 3), residual=True, activation="relu", padding=1, **half),
        "bfloat16": partial(matches, (1, 2, 3), dtype=torch.bfloat16, activation="silu", residual=True),
        "float64": partial(matches, (1, 2, 3), dtype=torch.float64, activation="mish"),
        "batches": partial(several_batches, 0.1),
        "a cumulative average": partial(several_batches, None),
        "untracked": untracked,
        "a large mean": large_mean,
        "nothing at all": nothing_at_all,
        "gradients of gradients": gradients_of_gradients,
        "some gradients": only_some_gradients,
        "forwards before backward": forwards_before_backward,
        "windows": windows,
        "SPADE": spade,
        "converted": converted,
        "compiled": partial(compiled, "aot_eager"),
        "errors": errors,
        "alone": alone,
    }
    return {
        f"{name}, {backend}": partial(with_backend, backend, case)
        for name, case in cases.items()
        for backend in ("torch", "triton")
    }


CASES = _cases()
