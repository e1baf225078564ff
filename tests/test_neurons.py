"""Choosing neurons and fitting the output matrix anew, against answers that are known."""

import pytest
import torch

from hf_fedlarge.neurons import NeuronFit

F, D, N = 96, 5, 400


def values(seed=0, count=F):
    """Neurons' values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, count, generator=generator) * torch.logspace(-2, 1, count) + 0.1


def matrix(seed=1, count=F):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def weights(seed=2):
    return torch.rand(N, 1, generator=torch.Generator().manual_seed(seed)) + 0.1


def solved(a, e, W, count, ridge=1e-6, w=None):
    sums = NeuronFit(W.clone())
    w = weights() if w is None else w
    for part in (slice(0, 150), slice(150, N)):
        sums.add(a[part], e[part], w[part])
    return sums.solve(count, ridge)[:2]


def test_with_nothing_to_gain_and_all_neurons_the_matrix_stays():
    kept, V = solved(values(), torch.zeros(N, D), matrix(), F, ridge=0.5)
    assert kept.tolist() == list(range(F))
    torch.testing.assert_close(V, matrix(), rtol=1e-4, atol=1e-4)


def test_what_another_matrix_would_give_is_recovered():
    a, gain = values(), matrix(seed=5)
    _, V = solved(a, a @ gain, matrix(), F)
    torch.testing.assert_close(a @ V, a @ (matrix() + gain), rtol=1e-3, atol=1e-2)


def test_neurons_that_give_nothing_or_what_others_give_go_first():
    a, W = values(), matrix()
    a[:, 7] = 0  # silent
    W[20] = 0  # unheard
    a[:, 50] = 2 * a[:, 51]  # a double
    kept, V = solved(a, torch.zeros(N, D), W, F - 3)
    assert not {7, 20} & set(kept.tolist())
    assert len({50, 51} & set(kept.tolist())) == 1
    torch.testing.assert_close(a[:, kept] @ V, a @ W, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_it_is_the_ridge_regression_that_it_says(ridge):
    a, e, W, w = values(), torch.randn(N, D, generator=torch.Generator().manual_seed(9)), matrix(), weights()
    kept, V = solved(a, e, W, 40, ridge)
    assert len(kept) == 40
    assert (kept.diff() > 0).all()
    a, e, W, w, V = a.double(), e.double(), W.double(), w.double(), V.double().requires_grad_()
    strength = ridge * (w * a[:, kept].square()).sum(dim=0)[:, None]
    objective = (w * (e + a @ W - a[:, kept] @ V).square()).sum() + (strength * (V - W[kept]).square()).sum()
    (slope,) = torch.autograd.grad(objective, V)
    # In units of each neuron's own size, as fp32 sees it.
    assert (slope / strength.sqrt()).abs().max() < 1e-3 * objective.sqrt()


def test_the_fit_is_no_worse_than_leaving_the_others_as_they_are():
    a, W, w = values(), matrix(), weights()
    mixed = a @ torch.randn(F, F, generator=torch.Generator().manual_seed(3)) / F**0.5  # neurons that are correlated
    kept, V = solved(mixed, torch.zeros(N, D), W, 48, ridge=0.1)

    def error(given):
        return (w * (mixed @ W - given).square()).sum()

    assert error(mixed[:, kept] @ V) < 0.5 * error(mixed[:, kept] @ W[kept])
    # And those that stay are better chosen than by chance.
    root = w.sqrt()

    def least(some):
        return error(mixed[:, some] @ torch.linalg.lstsq(root * mixed[:, some], root * (mixed @ W)).solution)

    kept, _ = solved(mixed, torch.zeros(N, D), W, 48)
    chances = [torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:48] for seed in range(10)]
    assert least(kept) < 0.7 * min(map(least, chances))


def test_second_moments_are_those_of_the_neurons_that_stay():
    sums, a, w = NeuronFit(matrix()), values(), weights()
    sums.add(a, torch.zeros(N, D), w)
    kept, _, gram = sums.solve(40)
    expected = (a[:, kept] * w).T @ a[:, kept]
    size = expected.diagonal().sqrt()
    torch.testing.assert_close(gram / size / size[:, None], expected / size / size[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [F, F + 40])
def test_costs_are_how_the_least_error_rises(count):
    """Against each step done afresh in fp64: the least squares of those that are left, and what goes with them."""
    a, W, w, ridge = values(count=count), matrix(count=count), weights(), 0.5
    sums = NeuronFit(W.clone())
    sums.add(a, torch.zeros(N, D), w)
    costs = sums.costs(ridge)
    gram = ((a * w).T @ a).double()
    gram += ridge * gram.diag().diag()
    left, fitted, before, expected = torch.arange(count), W.double(), 0.0, []
    for goal in range((count - 1) // 64 * 64, 0, -64):
        missed = fitted.square().sum(dim=1) / torch.linalg.inv(gram[left][:, left]).diag()
        left = left[missed.topk(goal).indices]
        fitted = torch.linalg.solve(gram[left][:, left], gram[left] @ W.double())
        change = -W.double()
        change[left] += fitted
        error = float((change * (gram @ change)).sum())
        expected.append(error - before)
        before = error
    assert costs == pytest.approx(expected, rel=1e-3)
    assert len(costs) == (count - 1) // 64
