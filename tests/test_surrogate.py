"""Surrogates: the regression against a known answer, and walking two models side by side."""

import json

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_dense, make_package
from torch import nn

from hf_fedlarge.artifacts import PackageManifest, read_manifest
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.fit import FitPlan, fit
from hf_fedlarge.package import load_package, stream_checkpoint
from hf_fedlarge.surrogate import Regression
from hf_fedlarge.tensors import CheckpointReader
from hf_fedlarge.walk import Walk

WIDTH = 6
IDS = torch.randint(4, 260, (5, 1, 12), generator=torch.Generator().manual_seed(3))


def states(count=200, seed=0):
    """Rows of very different sizes, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, 2, count)[:, None]
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * sizes + 1


def regression_of(x, y, pieces=(64, 136)):
    regression = Regression(WIDTH, x.device)
    for part_x, part_y in zip(x.split(pieces), y.split(pieces), strict=True):
        regression.add(part_x, part_y)
    return regression


def test_a_linear_layer_is_recovered_exactly():
    x = states()
    T, b = torch.randn(WIDTH, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    regression = regression_of(x, x + x @ T + b)
    found = regression.solve(ridge=0.0)
    torch.testing.assert_close(found, T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(regression.bias(found), b, rtol=1e-6, atol=1e-6)
    assert regression.unexplained(found, b) < 1e-12


def test_a_layer_that_changes_nothing_leaves_nothing_unexplained():
    x = states()
    regression = regression_of(x, x)
    T = regression.solve()
    assert not T.any()
    assert regression.unexplained(T, regression.bias(T)) == 0


def test_it_is_the_weighted_ridge_regression_that_it_says():
    x, ridge = states(), 0.1
    y = x + torch.tanh(x) * 3
    regression = regression_of(x, y)
    T, w = regression.solve(ridge), 1 / x.square().sum(dim=1, keepdim=True)
    b = regression.bias(T)

    centred = x - (w * x).sum(dim=0) / w.sum()
    strength_D1 = ridge * (w * centred.square()).sum(dim=0)[:, None]

    def objective(T, b):
        return (w * (y - x - x @ T - b).square()).sum() + (strength_D1 * T.square()).sum()

    T.requires_grad_(), b.requires_grad_()
    slopes = torch.autograd.grad(objective(T, b), [T, b])
    assert all(slope.abs().max() < 1e-8 * strength_D1.max() for slope in slopes)
    share = (w * (y - x - x @ T - b).square()).sum() / (w * (y - x).square()).sum()
    assert regression.unexplained(T.detach(), b.detach()) == pytest.approx(share.item(), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_map_of_that_rank_is_recovered_exactly(rank):
    x = states()
    T = torch.randn(WIDTH, rank, dtype=torch.float64) @ torch.randn(rank, WIDTH, dtype=torch.float64)
    regression = regression_of(x, x + x @ T + 1)
    U = regression.reduce(regression.solve(ridge=0.0), rank, ridge=0.0)
    assert U.shape == (WIDTH, rank)
    torch.testing.assert_close(U @ regression.behind(U, ridge=0.0), T, rtol=1e-6, atol=1e-6)


def test_a_lower_rank_is_the_best_of_that_rank():
    """Against the truncated SVD of Lᵀ T, with L Lᵀ = Xᵀ w X + λ worked out from the rows."""
    x, ridge, rank = states(), 0.1, 2
    regression = regression_of(x, x + torch.tanh(x) * 3 + x.roll(1, dims=1))
    T, w = regression.solve(ridge), 1 / x.square().sum(dim=1, keepdim=True)
    centred = x - (w * x).sum(dim=0) / w.sum()
    covariance = centred.T @ (w * centred)
    L = torch.linalg.cholesky(covariance + torch.diag(covariance.diagonal() * ridge))
    left, sizes, right = torch.linalg.svd(L.T @ T)
    expected = torch.linalg.solve(L.T, left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank])
    U = regression.reduce(T, rank, ridge)
    torch.testing.assert_close(U @ regression.behind(U, ridge), expected, rtol=1e-6, atol=1e-8)
    # Not the largest part of the map itself, which the sizes of the coordinates would decide.
    a, s, b = torch.linalg.svd(T)
    assert not torch.allclose(expected, a[:, :rank] @ torch.diag(s[:rank]) @ b[:rank], rtol=0.01)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_walking_block_by_block_computes_what_the_model_does(family, tmp_path):
    model = stream_checkpoint(make_checkpoint(tmp_path / "full", family, layers=3), dtype=torch.float32)
    walk = Walk(model, IDS[0])
    assert model.engine.counters.visits == 1  # what blocks are given is recorded without computing them all
    together = walk.embed(IDS[:2, 0])
    for number in range(len(walk)):
        together = walk.step(number, together)
    for place, ids in enumerate(IDS[:2]):
        hidden = walk.embed(ids)
        for number in range(len(walk)):
            hidden = walk.step(number, hidden)
        torch.testing.assert_close(together[place], hidden[0], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert walk.loss(hidden, ids) == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
            # Nothing is left behind on the blocks.
            assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("family", "codec", "rank"),
    [
        ("llama", "int8", None),
        ("gemma3", "int8", None),
        ("gpt2", "int8", None),
        ("opt", "int8", None),
        ("llama", "nf4", 8),
        ("gptj", "dense", 5),
    ],
)
def test_a_package_with_a_surrogate_computes_what_the_equations_say(family, codec, rank, tmp_path):
    package = make_package(tmp_path / "package", family, surrogate_codec=codec, surrogate_rank=rank)
    streamed, dense = load_package(package, dtype=torch.float32), make_dense(package)
    (entry,) = read_manifest(package, PackageManifest).surrogates
    assert (entry.layers, entry.codec, entry.rank) == ([1], codec, rank)
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS[0]).logits, dense(IDS[0]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", ["nf4", "int8", "dense"])
def test_a_surrogate_stands_in_for_a_run_and_never_does_worse_than_nothing(codec, tmp_path):
    package = make_package(tmp_path / "package", "llama", layers=6, keep="0,3,4", surrogate_codec=codec)
    entries = read_manifest(package, PackageManifest).surrogates
    assert [entry.layers for entry in entries] == [[1, 2], [5]]
    assert all(0 < entry.unexplained <= 1 for entry in entries)


def test_a_higher_rank_explains_more_and_the_highest_is_a_single_matrix(tmp_path):
    found = {}
    for rank in (4, 32, 64, None):
        package = make_package(tmp_path / f"{rank}", "llama", surrogate_codec="int8", surrogate_rank=rank)
        (found[rank],) = read_manifest(package, PackageManifest).surrogates
    assert 1 > found[4].unexplained > found[32].unexplained > found[64].unexplained > 0
    assert found[64] == found[None]
    # What has none is written as before there were ranks.
    assert "rank" not in found[64].model_dump()
    assert found[4].model_dump(mode="json")["rank"] == 4


def test_a_rank_that_is_not_the_stored_one_is_refused(tmp_path):
    package = make_package(tmp_path / "package", "llama", surrogate_codec="int8", surrogate_rank=8)
    raw = json.loads((package / "fedlarge.json").read_text())
    for rank in (9, None):
        raw["surrogates"][0]["rank"] = rank
        (package / "fedlarge.json").write_text(json.dumps(raw))
        with pytest.raises(ArtifactError, match=r"surrogates\.1\.weight has the shape \(8, 64\)"):
            load_package(package)


def test_a_surrogate_corrects_what_quantization_did_to_the_blocks_before_it(tmp_path):
    package = make_package(tmp_path / "package", "llama", surrogate_codec="dense")
    full = package.with_name("package-full")
    teacher = Walk(stream_checkpoint(full, dtype=torch.float32), IDS[0])
    student = Walk(load_package(make_package(tmp_path / "plain", "llama"), dtype=torch.float32), IDS[0])
    # On the student's states, not the teacher's own: a fit to those is worse on these.
    x = torch.cat([student.step(0, student.embed(ids))[0] for ids in IDS])
    own = torch.cat([teacher.step(0, teacher.embed(ids))[0] for ids in IDS])
    y = torch.cat([teacher.step(1, teacher.step(0, teacher.embed(ids)))[0] for ids in IDS])
    fits = []
    for inputs in (x, own):
        regression = Regression(x.shape[1], x.device)
        regression.add(inputs, y)
        T = regression.solve()
        fits.append(((x + x @ T.float() + regression.bias(T).float() - y) / x.norm(dim=1, keepdim=True)).norm())
    assert fits[0] < fits[1]


def test_where_the_dropped_layer_is_a_linear_map_the_small_model_is_the_full_one(tmp_path):
    """A layer whose attention gives nothing and whose MLP is off, with a linear map put behind it."""
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=3)
    teacher_model = stream_checkpoint(checkpoint, dtype=torch.float32)
    student_model = stream_checkpoint(checkpoint, dtype=torch.float32)
    teacher, student = Walk(teacher_model, IDS[0]), Walk(student_model, IDS[0])
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 16
    teacher_model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden + nn.functional.linear(hidden, W)
    many = torch.randint(4, 260, (40, 1, 12), generator=torch.Generator().manual_seed(1))
    plan = FitPlan(kept=(0, 2), surrogate_codec="dense", widths={}, surrogate_ridge=1e-9)
    fitted = fit(teacher, student, teacher_model.architecture, plan, list(many), tmp_path)
    stored = fitted.tensors["surrogates.1.weight"].float()
    torch.testing.assert_close(stored, W, rtol=0.01, atol=1e-3)  # bf16
    assert fitted.surrogates[0].unexplained < 1e-4


def test_the_shards_of_the_base_are_left_alone(tmp_path):
    package = make_package(tmp_path / "package", "llama", surrogate_codec="nf4")
    assert not any(name.startswith("surrogates") for name in CheckpointReader(package.with_name("package-full")).infos)
