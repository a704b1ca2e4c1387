"""The cases that torch tests its own norms with, on ours."""

import copy
import pickle

import pytest
import torch
from oracle import assert_close, assert_close_as_vectors, torchs
from torch import nn

import triton_norm as tn

FAMILY = ["GroupNorm", "LayerNorm", "RMSNorm"]
NAMES = [f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)] + FAMILY
#: Those of the family are the same in both modes.
NAMES_AND_MODES = pytest.mark.parametrize(
    "name, training",
    [
        pytest.param(name, training, id=f"{name}-{'train' if training else 'eval'}")
        for name in NAMES
        for training in ((True,) if name in FAMILY else (True, False))
    ],
)


@pytest.fixture(scope="module")
def module_db():
    from torch.testing._internal import common_modules

    infos = {info.name.removeprefix("nn."): info for info in common_modules.module_db}
    assert set(NAMES) <= set(infos)
    return infos


def samples(module_db, name, backend, training, dtype):
    """Ours, torch's in float64 with the same state, the case's input, and what torch calls the case."""
    info = module_db[name]
    torch.manual_seed(0)
    cases = info.module_inputs_func(info, device=backend.device, dtype=dtype, requires_grad=True, training=training)
    # Six and more in recent releases of torch.
    assert len(cases) >= 4
    for case in cases:
        constructor, forward = case.constructor_input, case.forward_input
        ours = getattr(tn, name)(*constructor.args, **constructor.kwargs, device=backend.device, dtype=dtype)
        theirs = torchs(name, *constructor.args, **constructor.kwargs, dtype=torch.float64)
        ours.train(training), theirs.train(training)
        assert not forward.kwargs and len(forward.args) == 1
        yield ours, theirs, forward.args[0], case


@NAMES_AND_MODES
def test_forward_and_backward(backend, module_db, name, training):
    dtype = torch.float32
    for ours, theirs, x, case in samples(module_db, name, backend, training, dtype):
        wide = x.detach().cpu().double().requires_grad_()
        y, want = ours(x), theirs(wide)
        assert y.dtype == dtype
        assert_close(y, want, dtype, case.desc)
        if case.reference_fn is not None:
            again = torchs(name, *case.constructor_input.args, **case.constructor_input.kwargs).to(x)
            assert_close(y, case.reference_fn(again.train(training), x), dtype, case.desc)
        dy = torch.randn(want.shape, dtype=torch.float64)
        y.backward(dy.to(y))
        want.backward(dy)
        assert_close(x.grad, wide.grad, dtype, case.desc)
        for key, p in theirs.named_parameters():
            assert_close_as_vectors(ours.get_parameter(key).grad, p.grad, dtype, f"{case.desc} {key}")
        for key, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(key), buffer, dtype, f"{case.desc} {key}")


@NAMES_AND_MODES
def test_first_and_second_derivatives(backend, module_db, name, training):
    """On one case, with parameters if any has some: every case's gradients are compared with torch's above."""
    cases = [(m, x) for m, _, x, _ in samples(module_db, name, backend, training, torch.float64)]
    ours, x = next((case for case in cases if list(case[0].parameters())), cases[0])
    inputs = (x, *ours.parameters())

    def call(x, *_):
        return ours(x)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_undefined_grad=False)
    if training:
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, check_undefined_grad=False)


@NAMES_AND_MODES
def test_noncontiguous_input_and_gradient(backend, module_db, name, training):
    for ours, _, x, case in samples(module_db, name, backend, training, torch.float64):
        other = copy.deepcopy(ours)
        apart = torch.testing.make_tensor(1, device=x.device, dtype=x.dtype).expand_as(x)
        apart = torch.stack([x.detach(), apart], -1)[..., 0].requires_grad_()
        y, z = ours(x), other(apart)
        assert_close(z, y, torch.float64, case.desc)
        dy = torch.randn(y.shape, dtype=y.dtype).to(y.device)
        y.backward(dy)
        z.backward(torch.stack([dy, dy], -1)[..., 1])
        assert_close(apart.grad, x.grad, torch.float64, case.desc)
        for p, q in zip(ours.parameters(), other.parameters(), strict=True):
            assert_close(q.grad, p.grad, torch.float64, case.desc)


@NAMES_AND_MODES
def test_repr_pickle_and_factory_arguments(backend, module_db, name, training):
    for ours, theirs, x, case in samples(module_db, name, backend, training, torch.float32):
        assert repr(ours) == repr(theirs)
        assert all(t.device == x.device for t in ours.state_dict().values())
        assert all(t.dtype in (torch.float32, torch.long) for t in ours.state_dict().values())
        assert repr(pickle.loads(pickle.dumps(ours))) == repr(ours), case.desc


#: torch's database has no error cases for InstanceNorm: (constructor arguments, input shape, part of the message).
INSTANCE_ERRORS = {
    1: [((3,), (4,), "expected 2D or 3D input (got 1D input)"),
        ((3,), (2, 2, 3, 4), "expected 2D or 3D input (got 4D input)"),
        ((3,), (2, 3, 1), "Expected more than 1 spatial element"),
        ((3, 1e-5, 0.1, True), (2, 5, 4), "expected input's size at dim=1 to match num_features (3), but got: 5.")],
    2: [((3,), (2, 3), "expected 3D or 4D input (got 2D input)"), ((3,), (2, 3, 1, 1), "spatial element"),
        ((3, 1e-5, 0.1, True), (2, 5, 4, 4), "to match num_features (3), but got: 5."),
        ((3, 1e-5, 0.1, True), (5, 4, 4), "expected input's size at dim=0 to match num_features (3), but got: 5.")],
    3: [((3,), (3, 4), "expected 4D or 5D input (got 2D input)"), ((3,), (2, 3, 1, 1, 1), "spatial element"),
        ((3, 1e-5, 0.1, True), (2, 5, 4, 4, 2), "to match num_features (3), but got: 5.")],
}  # fmt: skip


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"])
def test_errors_of_the_database(backend, module_db, name):
    info = module_db[name]
    if info.module_error_inputs_func is None:
        pytest.skip("this release of torch lists no errors of it")
    cases = info.module_error_inputs_func(
        info, device=backend.device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert len(cases) >= 2
    for case in cases:
        made, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        if case.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(tn, name)(*made.args, **made.kwargs)
            continue
        module = getattr(tn, name)(*made.args, **made.kwargs, device=backend.device)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*forward.args, **forward.kwargs)
        assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())


@pytest.mark.parametrize(
    "n, constructor, shape, message", [(n, *case) for n, cases in INSTANCE_ERRORS.items() for case in cases]
)
def test_errors_of_instance_norm(backend, n, constructor, shape, message):
    messages = []
    for package in (tn, nn):
        module = getattr(package, f"InstanceNorm{n}d")(*constructor, device=backend.device)
        with pytest.raises(ValueError) as raised:
            module(torch.zeros(shape, device=backend.device))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert message in messages[0]
