"""What is compiled computes what torch's operations do, for any sizes; without a compiler they take its place."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fedlarge import gated, loss, packed, quantize
from hf_fedlarge import kernels as module
from hf_fedlarge.architectures import LogitTransform
from hf_fedlarge.gated import differentiate_gate, multiply_gate
from hf_fedlarge.kernels import kernels, kernels_for
from hf_fedlarge.loss import StreamedHead
from hf_fedlarge.norm import rms_norm
from hf_fedlarge.quantize import DenseWeight, Int8Weight, decode, encode

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no GCC on this machine")
# Less than a vector, no multiple of one, and more than a thread's piece.
each_shape = pytest.mark.parametrize("shape", [(1, 3), (7, 64), (5, 2055), (40, 576)], ids=str)
ULP = 2.0**-7  # of bf16, relative, at most


def some(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def in_torch(monkeypatch):
    """Calls a function without what is compiled."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            for place in (module, loss, quantize):
                patch.setattr(place, "kernels", lambda: None)
            return function(*arguments)

    return call


def assert_rounded(found, truth):
    """bf16 numbers that are fp64 ones rounded, up to the last bits of fp32 before that."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), truth, rtol=ULP / 2 + 1e-5, atol=1e-6)


@needs_gcc
@each_shape
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_rms_norm(shape, threads, in_torch):
    x, weight, grad = some(3, *shape), some(shape[1], seed=1), some(3, *shape, seed=2)
    assert kernels_for(x, weight, grad) is not None

    def both():
        given = x.clone().requires_grad_()
        value = rms_norm(given, weight, 1e-5)
        return value.detach(), torch.autograd.grad(value, given, grad)[0]

    value, gradient = both()
    plain_value, plain_gradient = in_torch(both)
    # Only the order of a sum differs, which moves a number that lies between two to the other one.
    torch.testing.assert_close(value, plain_value, rtol=ULP, atol=0)
    assert (value != plain_value).float().mean() < 0.01
    torch.testing.assert_close(gradient, plain_gradient, rtol=2 * ULP, atol=2 * ULP)
    exact = x.double().requires_grad_()
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    truth = torch.autograd.grad(normed, exact, grad.double())[0]
    torch.testing.assert_close(gradient.double(), truth, rtol=ULP / 2 + 1e-4, atol=1e-4)


@needs_gcc
@each_shape
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("kind", [nn.SiLU, gated.GELUTanh])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gate(shape, threads, kind, dtype):
    activation = gated._ACTIVATIONS[kind]
    gate, up, grad = 4 * some(*shape), some(*shape, seed=1), some(*shape, seed=2, dtype=dtype)
    gate[0, :3] = torch.tensor([-200.0, 0.0, 200.0])  # where e^x alone would be 0 or infinite
    assert kernels_for(gate, up) is not None
    found, again = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    multiply_gate(activation, gate, up, found)
    gradients = differentiate_gate(activation, gate, up, grad, again)
    exact = [tensor.double().requires_grad_() for tensor in (gate, up)]
    truth = activation.value(exact[0]) * exact[1]
    wanted = torch.autograd.grad(truth, exact, grad.double())
    if dtype == torch.bfloat16:
        assert_rounded(found, truth.detach())
    else:
        torch.testing.assert_close(found.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(again, found)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert_rounded(ours, theirs)
    for ours, theirs in zip(differentiate_gate(activation, gate, up, grad, None), gradients, strict=True):
        assert torch.equal(ours, theirs)


@needs_gcc
def test_what_is_not_a_number_stays_so():
    x, weight = some(2, 64), some(64, seed=1)
    x[1, 5] = torch.nan
    value = rms_norm(x, weight, 1e-5)
    assert value[0].isfinite().all()
    assert value[1].isnan().all()
    out = torch.empty_like(x)
    multiply_gate(gated._ACTIVATIONS[nn.SiLU], x, torch.ones_like(x), out)
    assert torch.equal(out.isnan(), x.isnan())
    infinite = torch.full((1, 64), torch.inf, dtype=torch.bfloat16)
    multiply_gate(gated._ACTIVATIONS[nn.SiLU], infinite, infinite, infinite)
    assert infinite.isposinf().all()


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rows", [300, 64, 7])
def test_a_loss(threads, dtype, scale, rows, in_torch):
    head = StreamedHead(DenseWeight(some(300, 32)), None, LogitTransform(scale=scale), dtype, torch.device("cpu"))
    head.rows, head.products = rows, dtype
    hidden, labels = some(50, 32, seed=1, dtype=dtype), torch.arange(50) * 37 % 300
    hidden[3] *= 200  # whose logits lie farther apart than e^x reaches

    def both():
        given = hidden.clone().requires_grad_()
        with head.recording() as losses:
            head.cross_entropy(given, labels).backward()
        return losses[0], given.grad

    losses, gradient = both()
    plain_losses, plain_gradient = in_torch(both)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-5)
    tolerance = ULP if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient, plain_gradient, rtol=2 * tolerance, atol=tolerance)


@needs_gcc
def test_a_confident_models_loss_is_no_difference_of_equals():
    """The label's own part is left out of a sum, not taken off it: 1 + 1e-9 is 1."""
    logits = torch.tensor([[30.0, 0.0, 9.0]])
    sums = torch.tensor([-torch.inf]), torch.zeros(1), torch.zeros(1)
    decay = kernels().softmax_slice(logits, torch.tensor([0]), 1.0, *sums)
    assert [round(total.item(), 3) for total in (sums[0], sums[2])] == [30, 30]
    expected = torch.tensor([9.0, 0.0], dtype=torch.float64).sub(30).exp().sum()
    torch.testing.assert_close(sums[1].double(), expected[None], rtol=1e-5, atol=0)
    assert logits[0, 0] == 0
    assert decay * 0 == 0


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("shape", [(30, 64), (6, 4096), (9, 40 * 64)], ids=str)
def test_nf4_is_that_of_bitsandbytes(shape, threads, in_torch):
    if not kernels().has_nf4:
        pytest.skip("this processor has no AVX-512")
    matrix = some(*shape, dtype=torch.float32) * torch.logspace(-4, 3, shape[0])[:, None]
    weight = decode("w", "nf4", encode("w", shape, "nf4", [matrix]))
    for start, stop in ((0, shape[0]), (1, 3), (shape[0] - 1, shape[0])):
        ours, theirs = (torch.empty(stop - start, shape[1], dtype=torch.bfloat16) for _ in "ab")
        weight.read_rows(start, stop, ours)
        in_torch(weight.read_rows, start, stop, theirs)
        assert torch.equal(ours, theirs)


@needs_gcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_int8_rows(dtype, in_torch):
    values = torch.arange(-128, 128).to(torch.int8).repeat(9, 5)
    weight = Int8Weight(values, torch.logspace(-3, 3, 9))
    ours, theirs = (torch.empty(6, values.shape[1], dtype=dtype) for _ in "ab")
    weight.read_rows(2, 8, ours)
    in_torch(weight.read_rows, 2, 8, theirs)
    assert torch.equal(ours, theirs)


# Less than a block, whole blocks, a strip and more; heads alone and shared; sizes that are no multiple of a block.
@needs_gcc
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "groups", "size"),
    [(1, 1, 1, 1, 2), (2, 31, 4, 2, 64), (1, 64, 3, 3, 80), (3, 130, 6, 2, 16), (1, 300, 2, 1, 128)],
)
def test_the_gradient_of_attention(threads, batch, tokens, heads, groups, size):
    if not kernels().has_tiles:
        pytest.skip("this processor has no AMX, or the system doesn't let us use it")
    q, k, v = (some(batch, tokens, count, size, seed=seed) for seed, count in enumerate((heads, groups, groups)))
    grad, scale = some(batch, tokens, heads, size, seed=3), 1.5 / size**0.5
    exact = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(heads // groups, 1) for x in exact[1:])
    scores = (scale * exact[0] @ keys.mT).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    wanted = torch.autograd.grad(out, exact, grad.double())
    value, lse = out.bfloat16().contiguous(), scores.logsumexp(-1).float().transpose(1, 2).contiguous()
    left, right = some(64, 256, seed=5), some(256, 64, seed=6)
    product = left @ right
    found = kernels().attention_gradient(q, k, v, value, grad, lse, scale)
    assert torch.equal(left @ right, product)  # which oneDNN computes with the same registers
    for gradient, truth in zip(found, wanted, strict=True):
        lost = gradient.double() - truth.transpose(1, 2)
        # One token attends to itself, however its query and key are: of their gradients nothing is left but rounding.
        assert lost.norm() < ULP * truth.norm().clamp_min(1 if tokens == 1 else 0)
    for gradient, again in zip(found, kernels().attention_gradient(q, k, v, value, grad, lse, scale), strict=True):
        assert torch.equal(gradient, again)
    grad[-1, tokens // 2, 0, 0] = torch.nan
    assert kernels().attention_gradient(q, k, v, value, grad, lse, scale)[0][-1, tokens // 2, 0].isnan().all()


# One token and more than a block; parts of K; rows that are no whole tiles; ranks beside a step of 32.
@needs_gcc
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    ("tokens", "shape", "rank"),
    [(1, (1, 64), 0), (1, (40, 128), 1), (70, (90, 128), 16), (33, (50, 2112), 40), (130, (2100, 64), 3)],
)
def test_products_with_nf4(threads, tokens, shape, rank):
    (rows, columns), cpu = shape, torch.device("cpu")
    weight = decode("w", "nf4", encode("w", shape, "nf4", [some(*shape, dtype=torch.float32)]))
    if not packed.can_multiply(weight, torch.bfloat16, cpu):
        pytest.skip("this processor has no AMX, or the system doesn't let us use it")
    W = torch.empty(shape, dtype=torch.bfloat16)
    weight.read_rows(0, rows, W)
    x, g, u, bias = some(tokens, columns), some(tokens, rows, seed=1), some(tokens, rank, seed=2), some(rows, seed=3)
    A, B = some(rank, columns, seed=4), some(rows, rank, seed=5)
    calls = [
        lambda: packed.multiply(x, weight, True, bias_P=bias, **({"u_NR": u, "more": B} if rank else {})),
        lambda: packed.multiply(g, weight, False, **({"u_NR": u, "more": A} if rank else {})),
    ]
    found = [call() for call in calls]
    exact = [part.double() for part in (x, W, u, B, g, A)]
    truths = exact[0] @ exact[1].T + exact[2] @ exact[3].T + bias.double(), exact[4] @ exact[1] + exact[2] @ exact[5]
    for ours, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=ULP / 2, atol=1e-6 * truth.norm().item())
    torch.set_num_threads(2)
    assert all(torch.equal(call(), ours) for call, ours in zip(calls, found, strict=True))


TILES = """
#include <immintrin.h>
#include <string.h>
static unsigned char set[64] = {1};  /* as another library may: one tile of 3 rows of 8 bytes */
void set_tiles(void) { set[16] = 8, set[48] = 3; __asm__ volatile("ldtilecfg %0" ::"m"(set)); }
int as_set(void) {
    unsigned char now[64];
    __asm__ volatile("sttilecfg %0" : "=m"(now));
    return memcmp(now, set, 64) == 0;
}
"""


@needs_gcc
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_who_else_uses_the_matrix_registers_finds_them_as_they_were(threads, tmp_path):
    if not kernels().has_tiles:
        pytest.skip("this processor has no AMX, or the system doesn't let us use it")
    (tmp_path / "tiles.c").write_text(TILES)
    command = ["gcc", "-O2", "-march=native", "-shared", "-fPIC", "tiles.c", "-o", "tiles.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    others = module.ctypes.CDLL(str(tmp_path / "tiles.so"))
    x, lse = some(1, 40, 2, 32), torch.zeros(1, 40, 2)
    others.set_tiles()
    kernels().attention_gradient(x, x, x, x, x, lse, 1.0)
    assert others.as_set()


def test_other_tensors_are_left_to_torch():
    x = some(4, 6)
    assert kernels_for(x.float()) is None
    assert kernels_for(x.t()) is None
    assert kernels_for(x, x.to("meta")) is None


# How they come to be


def in_process(tmp_path, **environment):
    """What a fresh process says about its kernels; its cache is below `tmp_path`."""
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from hf_fedlarge.kernels import kernels\n"
        "print('compiled' if kernels() else 'torch')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | environment,
    )
    return result.stdout.strip(), result.stderr


def libraries(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.so*"))


@pytest.fixture
def compiler(tmp_path):
    """A directory for PATH in which a gcc is that does what a script says."""

    def make(script):
        path = tmp_path / "bin" / "gcc"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(stat.S_IRWXU)
        return str(path.parent)

    return make


@needs_gcc
def test_they_are_compiled_once(tmp_path):
    assert in_process(tmp_path)[0] == "compiled"
    [kept] = libraries(tmp_path)
    before = kept.stat().st_mtime_ns
    assert in_process(tmp_path, PATH=str(tmp_path))[0] == "compiled"  # where no GCC is found any more
    assert [path.stat().st_mtime_ns for path in libraries(tmp_path)] == [before]


@needs_gcc
def test_nobody_elses_library_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module._compiled()
    [kept] = libraries(tmp_path)
    theirs = b"what another user put there"
    kept.unlink()  # the one that is loaded can't be written to
    kept.write_bytes(theirs)
    opened = []
    real = module.ctypes.CDLL
    monkeypatch.setattr(module.ctypes, "CDLL", lambda path: opened.append(Path(path).read_bytes()) or real(path))
    monkeypatch.setattr(module.os, "getuid", lambda: kept.stat().st_uid + 1)
    assert hasattr(module._compiled(), "rms_norm")
    assert theirs not in opened


@needs_gcc
def test_a_cache_that_can_not_be_written_to_is_done_without(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert in_process(tmp_path)[0] == "compiled"


def test_without_a_compiler_torch_does_it_and_the_log_says_so(tmp_path):
    said, log = in_process(tmp_path, PATH=str(tmp_path))
    assert said == "torch"
    assert "GCC was not found" in log


@pytest.mark.parametrize("script", ["echo 'cannot find -lgomp' >&2; exit 1", "exit 0", "kill $$"])
def test_a_compiler_that_fails_is_as_good_as_none(tmp_path, compiler, script):
    said, log = in_process(tmp_path, PATH=compiler(script))
    assert said == "torch"
    assert "Torch's operations take the place" in log
    assert libraries(tmp_path) == []


def test_threads_that_need_them_first_wait_for_one_of_them(monkeypatch):
    tried = []

    def fail():
        tried.append(None)
        time.sleep(0.1)
        raise OSError("GCC was not found")

    monkeypatch.setattr(module, "_load", cache(module._load.__wrapped__))
    monkeypatch.setattr(module, "_compiled", fail)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: kernels(), range(4))) == [None] * 4
    assert len(tried) == 1


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HF_FEDLARGE_KERNELS", "off")
    assert module._load.__wrapped__() is None


@needs_gcc
def test_a_kept_library_that_is_broken_is_replaced(tmp_path, caplog):
    in_process(tmp_path)
    [kept] = libraries(tmp_path)
    kept.write_bytes(b"cut")
    with caplog.at_level(logging.INFO):
        assert in_process(tmp_path)[0] == "compiled"
    assert libraries(tmp_path) == [kept]
    assert kept.stat().st_size > 1000
