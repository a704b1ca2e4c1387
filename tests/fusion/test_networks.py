"""Networks that nobody here wrote: nearly all that stands behind their norms is fused, and they compute the same.

They need the packages of the extra ``networks``: ``pip install -e '.[networks]'``.
"""

import copy
import functools
import importlib.util
import inspect
import io
import time
from pathlib import Path

import networks
import plain
import pytest
import torch
import twins
from torch import nn

import triton_norm as tn
from triton_norm.fusion import trace
from triton_norm.fusion.backend import backend


@pytest.fixture
def network(request, monkeypatch):
    network = networks.NETWORKS[request.param]
    if importlib.util.find_spec(network.package) is None:
        pytest.skip(f"needs {network.package}, of the extra networks: pip install -e '.[networks]'")
    networks.torchvision_can_be_imported()
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch._dynamo.reset()
    return network


every_network = pytest.mark.parametrize("network", networks.NETWORKS, indirect=True)


def check(network, ours, call, reference):
    """A training step and evaluation of ``call``, which runs ``ours``, against the plain reference."""
    assert list(ours.state_dict()) == list(reference.state_dict())
    tolerance = {"atol": network.tolerance, "rtol": network.tolerance}
    calls = ((call, ours), (reference, reference))
    for training in (True, False):
        found = []
        for function, model in calls:
            model.train(training).zero_grad()
            torch.manual_seed(0)  # for labels that are dropped
            y = network.result(function(**network.inputs))
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
            (y * direction).sum().backward()
            found.append((y.detach(), [p.grad for p in model.parameters()]))
        (y, gradients), (wanted_y, wanted) = found
        torch.testing.assert_close(y, wanted_y, **tolerance)
        for gradient, want in zip(gradients, wanted, strict=True):
            assert (gradient is None) == (want is None)
            if want is not None:
                # Of which some are sums of terms that cancel.
                assert (gradient - want).norm() <= network.tolerance * (want.norm() + wanted_y.norm())
    for value, want in zip(ours.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, want, **tolerance)


def originals_of(fused, network):
    """The paths of modules whose forward is fused, and whose original forward ran all the same."""
    found = []
    for path, module in fused.named_modules():
        names = inspect.unwrap(type(module).forward).__globals__
        if isinstance(module, trace.Rewritten) and "original" in names:
            names["original"] = lambda *args, path=path, original=names["original"], **kwargs: (
                found.append(path) or original(*args, **kwargs)
            )
    fused(**network.inputs)
    return found


@every_network
def test_fuse(network):
    model = twins.randomize(network.make())
    reference = copy.deepcopy(model)
    began = time.process_time()
    fused = tn.fuse(model)
    # At most 1.7 s on an idle machine, four times that on a busy one: this is for what grows faster than the model.
    assert time.process_time() - began < 20
    assert isinstance(fused, type(model))
    check(network, fused, fused, reference)
    assert (originals_of(fused, network) == []) == network.is_known
    report = tn.fuse_report(fused)
    assert report.operations == network.operations
    assert report.remaining == network.stay
    assert len(report.stayed) == report.remaining


def test_the_page():
    """The page's figures are those that the networks are tested for."""
    page = (Path(tn.__file__).parents[1] / "docs" / "fusing.md").read_text(encoding="utf-8")
    seen, captured, stay = map(sum, zip(*[
        (n.operations, n.operations if n.captured is None else n.captured, n.stay) for n in networks.NETWORKS.values()
    ], strict=True))  # fmt: skip
    said = f"sees {captured} operations around their norms and fuses all, `fuse` sees {seen} and leaves the {stay}"
    assert said in " ".join(page.split())
    (unknown,) = (n for n in networks.NETWORKS.values() if not n.is_known)
    assert f"and the {unknown.operations} of GPT-2" in " ".join(page.split())


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs onnx, of the extra networks")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, functools.partial(nn.GroupNorm, 2)])
def test_fused_models_are_exported_to_onnx(norm, monkeypatch):
    """By the exporter that goes through TorchScript, whose knowledge of shapes ends at paddings."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    fused = tn.fuse(plain.ResnetGenerator(3, 2, 4, norm, n_blocks=2).eval())
    assert tn.fuse_report(fused).remaining == 0
    file = io.BytesIO()
    torch.onnx.export(fused, (torch.randn(1, 3, 32, 32),), file, dynamo=False)
    assert len(file.getvalue()) > 1000


@every_network
def test_backend(network):
    model = twins.randomize(network.make())
    reference = copy.deepcopy(model)
    seconds = []

    def timed(graph, inputs):
        began = time.process_time()
        compiled = backend(graph, inputs, options={"rest": "eager"})
        seconds.append(time.process_time() - began)
        return compiled

    check(network, model, torch.compile(model, backend=timed), reference)
    assert sum(seconds) < 2
    report = tn.fuse_report(torch.compile(model, backend=timed))
    assert report.remaining == 0
    # Where blocks alike share one compiled graph, it is listed once.
    there = network.operations if network.captured is None else network.captured
    assert 0.85 * there <= report.operations <= there
