"""The Triton kernels in CUDA graphs and on streams of one's own: what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from oracle import make_case
from torch import Tensor

import bnkit.nn
from bnkit.ops import cuda

pytestmark = pytest.mark.skipif(not cuda.available(), reason="no GPU that the kernels run on")

# Each way through the kernels, in both layouts.
SHAPES = {(8, 16, 7, 7): "slabs", (64, 24, 56, 56): "sweeps"}
CASES = [(shape, layout) for shape in SHAPES for layout in ("contiguous", "channels_last")]


def layer_and_inputs(shape: tuple[int, ...], layout: str) -> tuple[bnkit.nn.BatchNorm2d, list[Tensor], Tensor]:
    case = make_case(shape, layout=layout, residual=True)
    layer = bnkit.nn.BatchNorm2d(shape[1], activation="relu").cuda()
    assert case.residual is not None
    inputs = [t.cuda().requires_grad_() for t in (case.x, case.residual)]
    assert cuda.supports(inputs[0], [*layer.parameters(), layer.running_mean, layer.running_var], inputs[1])
    return layer, inputs, case.dy.cuda()


def step(layer: bnkit.nn.BatchNorm2d, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = layer(*inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)]


def warmed_up(layer: bnkit.nn.BatchNorm2d, inputs: list[Tensor], dy: Tensor) -> None:
    """The kernels compiled, on a stream of its own as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layer, inputs, dy)
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_a_captured_step_is_replayed_on_new_values(shape, layout):
    layer, inputs, dy = layer_and_inputs(shape, layout)
    warmed_up(layer, inputs, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, inputs, dy)
    layer.reset_running_stats()
    with torch.no_grad():
        for tensor in (*inputs, dy):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    found, running = [t.clone() for t in captured], [b.clone() for b in layer.buffers()]
    layer.reset_running_stats()
    for ours, expected in zip(found, step(layer, inputs, dy), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(running, layer.buffers(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_a_captured_inference_is_replayed_on_new_values(shape, layout):
    layer, inputs, dy = layer_and_inputs(shape, layout)
    warmed_up(layer, inputs, dy)
    layer.eval()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(*inputs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(*inputs)
        inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        assert torch.equal(y, layer(*inputs))


def test_inplace_can_be_captured():
    """What is kept then is the input: the look at the parameters would have to wait for them."""
    x = torch.randn(8, 16, 7, 7, device="cuda", requires_grad=True)
    layer = bnkit.nn.BatchNorm2d(16, activation="leaky_relu", inplace=True).cuda()
    warmed_up(layer, [x], torch.ones_like(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, [x], torch.ones_like(x))
    graph.replay()
    for ours, expected in zip(captured, step(layer, [x], torch.ones_like(x)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_a_stream_of_its_own(shape, layout):
    """The kernels wait for what comes before them in the current stream, and for nothing else."""
    layer, inputs, dy = layer_and_inputs(shape, layout)
    expected = step(layer, inputs, dy)
    torch.cuda.synchronize()
    values = [t.detach().clone() for t in (*inputs, dy)]
    with torch.no_grad():
        for tensor in (*inputs, dy):
            tensor.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for tensor, value in zip((*inputs, dy), values, strict=True):
                tensor.copy_(value)
        found = step(layer, inputs, dy)
    side.synchronize()
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_streams_at_once():
    """Two steps that run beside each other share nothing."""
    problems = [layer_and_inputs(shape, layout) for shape, layout in CASES]
    expected = [step(*problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        found = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*problem))
        torch.cuda.synchronize()
        for results, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.skipif(cuda.available() and torch.cuda.mem_get_info()[0] < 30 << 30, reason="takes 30 GiB of the GPU")
def test_more_values_than_32_bits_count():
    """The last rows are where offsets of 32 bits would have come round."""
    rows, channels = 2**31 // 96 + 1000, 96
    x, dy = (torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    layer = bnkit.nn.BatchNorm1d(channels, activation="relu").cuda()
    y, dx, dweight, dbias = step(layer, [x], dy)
    mean, var = layer.running_mean / 0.1, (layer.running_var - 0.9) / 0.1
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-2)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=1e-2)
    last = slice(rows - 500, rows)
    xhat = (x[last].detach().float() - mean) * (var + layer.eps).rsqrt()
    g = torch.where(xhat > 0, dy[last].float(), 0.0)
    torch.testing.assert_close(y[last].float(), xhat.relu(), rtol=1e-2, atol=1e-2)
    wanted = (g - dbias / rows - xhat * dweight / rows) * (var + layer.eps).rsqrt()
    torch.testing.assert_close(dx[last].float(), wanted, rtol=1e-2, atol=1e-2)
