"""Robust aggregation against dense oracles, and against clients who want to spoil the model."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import federate, loss, make_factors, product

from hf_fedlarge.aggregate import Change
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.robust import clip_factors, gram, krum, median, squared_norms, trimmed_mean
from hf_fedlarge.subspace import subspace

reproducible = settings(deadline=None, derandomize=True, max_examples=40)


@st.composite
def cohorts(draw, fewest=1):
    """Changes of mixed ranks from bases that differ or aren't there."""
    out_features, in_features = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    count, seed = draw(st.integers(fewest, 7)), draw(st.integers(0, 2**32))
    bases = [None, make_factors(2, out_features, in_features, seed), make_factors(3, out_features, in_features, seed)]
    return [
        Change(
            1 / count,
            draw(st.floats(0.1, 10)),
            make_factors(draw(st.integers(1, 5)), out_features, in_features, seed + 1 + number),
            draw(st.sampled_from(bases)),
        )
        for number in range(count)
    ]


def dense(changes):
    """(N, O, I)."""
    return torch.stack(
        [product(c.factors, c.scale) - (0 if c.base is None else product(c.base, c.scale)) for c in changes]
    )


@reproducible
@given(cohorts())
def test_the_median_is_that_of_every_coordinate(changes):
    dense_NOI = dense(changes).sort(dim=0).values
    middle = dense_NOI[(len(changes) - 1) // 2 : len(changes) // 2 + 1].mean(0)
    found, lost = median(changes, 10)
    assert (product(found.factors) - middle).norm() <= 1e-9 * dense_NOI.norm()
    assert lost <= 1e-9 * dense_NOI.norm() ** 2
    kept, lost = median(changes, 2)
    assert len(kept.factors.A_RI) <= 2
    expected = torch.linalg.svdvals(middle)[2:].square().sum().item()
    assert lost == pytest.approx(expected, abs=1e-9 * dense_NOI.norm().item() ** 2)


@reproducible
@given(cohorts(fewest=3), st.integers(1, 3))
def test_the_trimmed_mean_is_that_of_every_coordinate(changes, byzantine):
    if len(changes) <= 2 * byzantine:
        with pytest.raises(ConfigError, match=f"needs at least {2 * byzantine + 1} updates to stand {byzantine}"):
            trimmed_mean(changes, 10, byzantine)
        return
    dense_NOI = dense(changes).sort(dim=0).values
    found, _ = trimmed_mean(changes, 10, byzantine)
    expected = dense_NOI[byzantine : len(changes) - byzantine].mean(0)
    assert (product(found.factors) - expected).norm() <= 1e-9 * dense_NOI.norm()


def test_a_median_is_made_a_few_rows_at_a_time(monkeypatch):
    changes = [Change(0.2, 1.0, make_factors(3, 23, 9, seed)) for seed in range(5)]
    whole, _ = median(changes, 9)
    monkeypatch.setattr("hf_fedlarge.robust._BLOCK_BYTES", 5 * 9 * 8 * 4)  # four rows
    parts, _ = median(changes, 9)
    torch.testing.assert_close(product(parts.factors), product(whole.factors))


def test_a_matrix_known_by_what_it_does_is_found_where_it_is_of_low_rank():
    M_OI = product(make_factors(6, 40, 50, 0))
    U_OK, S_K, V_KI, energy = subspace(lambda X: M_OI @ X, lambda Y: M_OI.T @ Y, 50, M_OI.dtype, 6)
    assert len(S_K) == 6
    torch.testing.assert_close(U_OK * S_K @ V_KI, M_OI)
    assert energy == pytest.approx(M_OI.square().sum().item())


@reproducible
@given(cohorts())
def test_norms_and_inner_products_of_changes_are_those_of_dense_matrices(changes):
    flat = dense(changes).flatten(1)
    torch.testing.assert_close(gram(changes), flat @ flat.T, rtol=1e-9, atol=1e-9 * flat.norm().item() ** 2)
    torch.testing.assert_close(squared_norms(changes), flat.square().sum(1), rtol=1e-6, atol=1e-9)


@reproducible
@given(st.integers(0, 2**32), st.integers(1, 2), st.data())
def test_krum_keeps_those_with_the_nearest_neighbours(seed, byzantine, data):
    count = data.draw(st.integers(2 * byzantine + 3, 9))
    keep = data.draw(st.sampled_from([1, count - byzantine - 2]))
    points = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = []
    for i in range(count):
        distances = sorted((points[i] - points[j]).square().sum().item() for j in range(count) if j != i)
        scores.append(sum(distances[: count - byzantine - 2]))
    assert krum(points @ points.T, byzantine, keep) == sorted(sorted(range(count), key=lambda i: scores[i])[:keep])


def test_krum_refuses_a_cohort_for_which_nothing_is_proved():
    with pytest.raises(ConfigError, match="krum needs at least 5 updates to stand 1 hostile clients, but there are 4"):
        krum(torch.eye(4, dtype=torch.float64), 1, 1)


def test_clipping_leaves_small_changes_and_shortens_large_ones():
    squares = torch.tensor([0.0, 1.0, 4.0, 9.0, 1e12], dtype=torch.float64)
    assert clip_factors(squares, 1.5) == [1.0, 1.0, 0.75, 0.5, 1.5e-6]
    assert clip_factors(squares, "median") == [1.0, 1.0, 1.0, 2 / 3, 2e-6]
    assert clip_factors(squares[[1, 4]], "median") == [1.0, 1e-6]  # of two the lower


# --- attacks: one or two of five clients send their update times a million, or with its sign turned ------------------

EQUAL = {"weighting": "equal"}
STANDS = [
    ("median", {"aggregator": "median", **EQUAL}, (4,)),
    ("median", {"aggregator": "median", **EQUAL}, (3, 4)),
    ("trimmed mean", {"aggregator": "trimmed_mean", "byzantine": 1, **EQUAL}, (4,)),
    ("trimmed mean", {"aggregator": "trimmed_mean", "byzantine": 2, **EQUAL}, (3, 4)),
    ("krum", {"aggregator": "krum", "byzantine": 1, **EQUAL}, (4,)),
    ("krum", {"aggregator": "krum", "byzantine": 2, "clients": 7, **EQUAL}, (3, 4)),
    ("multi-krum", {"aggregator": "multi_krum", "byzantine": 1, **EQUAL}, (4,)),
    ("multi-krum", {"aggregator": "multi_krum", "byzantine": 2, "clients": 7, **EQUAL}, (3, 4)),
    ("clipping", {"clip": "median"}, (4,)),
]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return loss(federate(tmp_path_factory.mktemp("clean")))


@pytest.mark.parametrize("by", [1e6, -1.0])
@pytest.mark.parametrize(("name", "choices", "hostile"), STANDS, ids=lambda value: str(value)[:20])
def test_robust_aggregators_end_where_the_clean_run_does(clean, tmp_path, name, choices, hostile, by):
    assert loss(federate(tmp_path, hostile=hostile, by=by, **choices)) <= 1.1 * clean


def test_clipping_stands_two_of_five_large_ones_and_is_slowed_down_by_two_turned_ones(clean, tmp_path):
    two = {"hostile": (3, 4), "clip": "median"}
    assert loss(federate(tmp_path / "large", by=1e6, **two)) <= 1.1 * clean
    assert loss(federate(tmp_path / "turned", by=-1.0, **two)) > 1.1 * clean
    assert loss(federate(tmp_path / "longer", by=-1.0, rounds=30, **two)) <= 1.1 * clean


BREAKS = [  # one more than each stands
    ("exact", {}, (4,)),
    ("svd", {"aggregator": "svd"}, (4,)),
    ("fedavg", {"aggregator": "fedavg"}, (4,)),
    ("median", {"aggregator": "median", **EQUAL}, (2, 3, 4)),
    ("trimmed mean", {"aggregator": "trimmed_mean", "byzantine": 1, **EQUAL}, (3, 4)),
    ("krum", {"aggregator": "krum", "byzantine": 1, **EQUAL}, (2, 3, 4)),
    ("multi-krum", {"aggregator": "multi_krum", "byzantine": 1, **EQUAL}, (2, 3, 4)),
    ("clipping", {"clip": "median"}, (2, 3, 4)),
]


@pytest.mark.parametrize(("name", "choices", "hostile"), BREAKS, ids=lambda value: str(value)[:20])
def test_beyond_the_breakdown_point_the_model_is_spoiled(tmp_path, monkeypatch, name, choices, hostile):
    if "krum" in name:  # they must agree to be each other's neighbours
        collude(monkeypatch, hostile)
    before = loss(federate(tmp_path / "none", rounds=0))
    assert loss(federate(tmp_path / "one", rounds=1, hostile=hostile, by=1e6, **choices)) > 1e3 * before


def collude(monkeypatch, hostile):
    import problems

    honest = problems.train
    monkeypatch.setattr(
        problems,
        "train",
        lambda adapter, output, client, *how, **more: honest(
            adapter, output, hostile[0] if client in hostile else client, *how, **more
        ),
    )


def test_the_order_of_clients_is_irrelevant():
    changes = [Change(0.2, 1.0, make_factors(3, 6, 8, seed)) for seed in range(5)]
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        shuffled = [changes[i] for i in order]
        torch.testing.assert_close(product(median(shuffled, 8)[0].factors), product(median(changes, 8)[0].factors))
        assert order[krum(gram(shuffled), 1, 1)[0]] == krum(gram(changes), 1, 1)[0]
