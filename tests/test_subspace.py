"""What subspace iteration is made of, against the plain computation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedlarge.subspace import _svd, multiply, subspace

reproducible = settings(deadline=None, derandomize=True, max_examples=30)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@reproducible
@given(st.lists(st.integers(1, 1200), min_size=1, max_size=3), st.integers(0, 2**32))
def test_products_are_those_of_dense_matrices(ranks, seed):
    """Of more inner columns than are multiplied at a time, too, and of factors that lie transposed in memory."""
    X_IK = normal(seed, 9, 5)
    terms = [(0.5 + n, normal(seed + n, rank, 9), normal(seed - n, 7, rank).T) for n, rank in enumerate(ranks)]
    expected = sum(coefficient * last.T @ first @ X_IK for coefficient, first, last in terms)
    torch.testing.assert_close(multiply(iter(terms), X_IK), expected)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5])
def test_singular_values_by_the_gram_matrix_are_as_good_as_fp32(smallest):
    """Near ties among them, and down to what fp32 tells from noise."""
    falling = torch.logspace(0, 1, 12, base=smallest, dtype=torch.float64).repeat_interleave(2)
    M_OK = (torch.linalg.qr(normal(0, 300, 24))[0] * falling @ torch.linalg.qr(normal(1, 24, 24))[0]).float().double()
    U_OK, S_K, V_KK = _svd(M_OK)
    torch.testing.assert_close(S_K, torch.linalg.svdvals(M_OK), rtol=1e-5, atol=0)
    torch.testing.assert_close(U_OK * S_K @ V_KK, M_OK, rtol=0, atol=1e-12)
    for rows in (U_OK.T, V_KK):
        torch.testing.assert_close(rows @ rows.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-5)


def test_nothing_has_no_directions():
    found = subspace(lambda X: torch.zeros(30, X.shape[1]), lambda Y: torch.zeros(40, Y.shape[1]), 40, torch.float32, 4)
    assert (len(found.S_K), found.U_OK.shape, found.V_KI.shape, found.energy) == (0, (30, 0), (0, 40), 0.0)


@pytest.mark.parametrize(("power", "least"), [(0.0, 1 - 1e-5), (0.1, 0.77), (1.0, 0.996)])
def test_of_every_spectrum_most_is_found(power, least):
    """Flat ones, where any directions do, and falling ones with near ties: in fp32 as much as in fp64."""
    sizes = torch.arange(1, 101, dtype=torch.float64).div(2).ceil() ** -power
    M_OI = torch.linalg.qr(normal(2, 150, 100))[0] * sizes @ torch.linalg.qr(normal(3, 100, 100))[0]
    found = {}
    for dtype in (torch.float32, torch.float64):
        M = M_OI.to(dtype)
        found[dtype] = subspace(lambda X, M=M: M @ X, lambda Y, M=M: M.T @ Y, 100, dtype, 8).S_K[:8].square().sum()
    best = sizes[:8].square().sum()
    assert least * best <= found[torch.float32] <= (1 + 1e-5) * best
    # In fp64 torch draws other vectors to begin with.
    assert found[torch.float32].item() == pytest.approx(found[torch.float64].item(), rel=0.05)
