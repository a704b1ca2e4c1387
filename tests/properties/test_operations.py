"""Sequences of what is done to a module, beside torch's in float64: train, convert, copy, save, load, change.

Longer and other sequences: ``pytest tests/properties --hypothesis-profile=long``.
"""

import copy
import io
import pickle

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from oracle import BY_NAME, TOLERANCES, torchs
from torch import Tensor, nn

import triton_norm as tn

CHANNELS = 4
SHAPE = (3, CHANNELS, 4, 5)
MAKERS = {
    "BatchNorm2d": ((CHANNELS,), {}),
    "BatchNorm2d, no statistics": ((CHANNELS,), {"track_running_stats": False}),
    "BatchNorm2d, no affine": ((CHANNELS,), {"affine": False, "momentum": None}),
    "InstanceNorm2d": ((CHANNELS,), {"affine": True}),
    "InstanceNorm2d, statistics": ((CHANNELS,), {"track_running_stats": True}),
    "GroupNorm": ((2, CHANNELS), {}),
    "LayerNorm": (((4, 5),), {}),
    "RMSNorm": ((5,), {"eps": 1e-5}),
}
#: Whose derivatives do not jump, wherever a rounding takes z.
SMOOTH = [None, "silu", "tanh", "softplus", nn.GELU(), nn.ELU()]


class Sequences(RuleBasedStateMachine):
    """``ours`` in any dtype and ``theirs`` in float64, after the same operations."""

    device = "cpu"

    @initialize(name=st.sampled_from(list(MAKERS)), seed=st.integers(0, 2**16))
    def make(self, name, seed):
        self.name, (args, options) = name.split(",")[0], MAKERS[name]
        self.args, self.options = args, options
        self.theirs = torchs(self.name, *args, **options).double()
        self.ours = getattr(tn, self.name)(*args, **options).to(self.device)
        self.activation, self.padding, self.dtype = None, 0, torch.float32
        self.channels_last = False
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, p in self.theirs.named_parameters():
                p.copy_(self.normal(p.shape) * 0.3 + (key == "weight"))
                # As it is in ours.
                self.ours.get_parameter(key).copy_(p)
                p.copy_(p.float())

    def normal(self, shape) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @property
    def pads(self) -> bool:
        return hasattr(self, "ours") and self.name not in ("LayerNorm", "RMSNorm")

    def close(self, got: Tensor, want: Tensor, what: str, size: float = 1.0) -> None:
        absolute, relative = TOLERANCES[self.dtype if got.is_floating_point() else torch.float64]
        got = got.detach().cpu()
        torch.testing.assert_close(
            got.double(), want.detach().double(), atol=absolute * size, rtol=relative, msg=lambda m: f"{what}: {m}"
        )

    def same_state(self) -> None:
        ours, theirs = self.ours.state_dict(), self.theirs.state_dict()
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            self.close(value, theirs[key], key, 2.0)
            assert not value.is_floating_point() or value.dtype == self.dtype
        assert self.ours.training == self.theirs.training
        flags = [p.requires_grad for p in self.ours.parameters()]
        assert flags == [p.requires_grad for p in self.theirs.parameters()]

    @invariant()
    def is_as_torchs(self):
        """A call after everything that was done."""
        if not hasattr(self, "ours"):
            return
        scale, residual, gradients = (bool(torch.randint(2, (), generator=self.generator)) for _ in range(3))
        scale = 3.0 if scale else 1.0
        self.same_state()
        x, r = ((self.normal(SHAPE) * scale + 0.5).to(self.dtype) for _ in range(2))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        leaves = [t.double().requires_grad_(gradients) for t in (x, r)]
        want = self.theirs(leaves[0]) + (leaves[1] if residual else 0)
        activation = self.activation or nn.Identity()
        want = (BY_NAME[activation] if isinstance(activation, str) else activation)(want)
        want = F.pad(want, (self.padding,) * 4, "reflect") if self.padding else want
        mine = [t.to(self.device).detach().requires_grad_(gradients) for t in (x, r)]
        got = self.ours(mine[0], mine[1] if residual else None)
        assert got.dtype == self.dtype
        if self.channels_last and self.pads:
            assert got.is_contiguous(memory_format=torch.channels_last)
        self.close(got, want, "output", scale)
        if gradients:
            dy = self.normal(want.shape).to(self.dtype)
            given = [*mine, *self.ours.parameters()], [*leaves, *self.theirs.parameters()]
            pairs = [(a, b) for a, b in zip(*given, strict=True) if a.requires_grad and (residual or a is not mine[1])]
            found = torch.autograd.grad(got, [a for a, _ in pairs], dy.to(self.device))
            true = torch.autograd.grad(want, [b for _, b in pairs], dy.double())
            for (a, _), g, t in zip(pairs, found, true, strict=True):
                assert g.dtype == a.dtype
                self.close(g, t, "gradient", max(1.0, t.abs().max().item(), dy.double().norm().item() * (a.dim() < 4)))
        self.same_state()
        # The next step is compared without the roundings of those before.
        self.theirs.load_state_dict({k: v.cpu().double() for k, v in self.ours.state_dict().items()})

    @rule(training=st.booleans())
    def train(self, training):
        self.ours.train(training)
        self.theirs.train(training)

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    def convert(self, dtype):
        self.ours, self.dtype = self.ours.to(dtype), dtype
        self.theirs = self.theirs.to(dtype).double()

    @rule(channels_last=st.booleans())
    def reformat(self, channels_last):
        self.channels_last = channels_last
        self.ours = self.ours.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @rule(eps=st.sampled_from([1e-5, 1e-3, 0.1]))
    def set_eps(self, eps):
        self.ours.eps = self.theirs.eps = eps

    @precondition(lambda self: hasattr(self, "ours") and hasattr(self.ours, "momentum"))
    @rule(momentum=st.sampled_from([0.1, 0.5, 1.0, None]))
    def set_momentum(self, momentum):
        self.ours.momentum = self.theirs.momentum = momentum

    @rule(activation=st.sampled_from(SMOOTH))
    def set_activation(self, activation):
        self.ours.activation = self.activation = activation

    @precondition(lambda self: self.pads)
    @rule(padding=st.integers(0, 2))
    def set_padding(self, padding):
        self.ours.padding = self.padding = padding

    @rule(flag=st.booleans())
    def freeze(self, flag):
        for module in (self.ours, self.theirs):
            module.requires_grad_(flag)

    @rule()
    def step(self):
        """An optimizer's: in place, with a known gradient."""
        for a, b in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            change = (self.normal(b.shape) * 0.1).to(self.dtype)
            with torch.no_grad():
                a.add_(change.to(self.device))
                b.add_(change.double())

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def duplicate(self, how):
        old = self.ours
        if how == "deepcopy":
            self.ours = copy.deepcopy(old)
        elif how == "pickle":
            self.ours = pickle.loads(pickle.dumps(old))
        else:
            file = io.BytesIO()
            torch.save(old, file)
            file.seek(0)
            self.ours = torch.load(file, weights_only=False)
        assert type(self.ours) is type(old) and repr(self.ours) == repr(old)
        # What is done to the copy is not done to the original.
        for p in old.parameters():
            p.data.fill_(float("nan"))

    @rule(torchs_own=st.booleans())
    def load(self, torchs_own):
        """Into a new module: what ours says, or what torch's does."""
        fresh = getattr(tn, self.name)(*self.args, **self.options).to(self.device, self.dtype)
        state = (self.theirs if torchs_own else self.ours).state_dict()
        fresh.load_state_dict(copy.deepcopy(state))
        fresh.eps, fresh.activation, fresh.training = self.ours.eps, self.activation, self.ours.training
        if hasattr(fresh, "momentum"):
            fresh.momentum = self.ours.momentum
        if self.pads:
            fresh.padding = self.padding
        for p, old in zip(fresh.parameters(), self.ours.parameters(), strict=True):
            p.requires_grad_(old.requires_grad)
        self.ours = fresh

    @precondition(lambda self: hasattr(self, "ours") and hasattr(self.ours, "reset_running_stats"))
    @rule()
    def reset(self):
        for module in (self.ours, self.theirs):
            module.reset_running_stats()


def test_any_sequence(backend):
    class OnThis(Sequences):
        device = backend.device

    # Every step is a call, forward and backward, and mostly of a kind that none before was.
    few = max(10, settings.default.max_examples // 50)
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run(OnThis, settings=settings(max_examples=few, suppress_health_check=health))
