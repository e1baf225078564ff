"""What a codec lost: turned with the adapter's basis, kept for the right round, and by whom it may be used."""

from types import SimpleNamespace

import pytest
import torch

from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.feedback import Lost, read_lost, turn, with_lost, write_lost
from hf_fedlarge.tensors import Factors

SHAPES = {"layers.0.q": ((3, 10), (7, 3)), "layers.1.q": ((3, 10), (7, 3))}


def random_factors(seed):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(3, 10, generator=generator), torch.randn(7, 3, generator=generator))


def wire(A_RI):
    return SimpleNamespace(shapes=SHAPES, lora="rank 3", parent_factors=lambda module: Factors(A_RI, None))


def test_what_was_lost_follows_the_adapter_into_another_basis():
    """B A = (B G⁻¹)(G A): the same model, and the same model with what is lost added."""
    (A_RI, B_OR), lost = random_factors(0), random_factors(1)
    G = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    turned = turn(Lost(lost, A_RI), G @ A_RI)
    there = (B_OR @ G.inverse() + turned.B_OR) @ (G @ A_RI + turned.A_RI)
    torch.testing.assert_close(there, (B_OR + lost.B_OR) @ (A_RI + lost.A_RI), rtol=1e-4, atol=1e-4)


def test_where_the_basis_stays_nothing_is_rounded():
    A_RI, lost = random_factors(0).A_RI, random_factors(1)
    assert turn(Lost(lost, A_RI), A_RI.clone()) is lost


def test_a_basis_whose_rows_depend_on_each_other_gives_finite_factors():
    A_RI = random_factors(0).A_RI
    flat = A_RI[:1].expand(3, -1).contiguous()
    for old, new in ((A_RI, flat), (flat, A_RI), (torch.zeros(3, 10), A_RI)):
        turned = turn(Lost(random_factors(1), old), new)
        assert all(factor.isfinite().all() and factor.norm() < 100 for factor in turned)


def test_a_round_reads_the_newest_before_it_and_two_are_kept(tmp_path):
    state = tmp_path / "state"
    A_RI = random_factors(0).A_RI
    assert read_lost(state, "p" * 64, 1, wire(A_RI)) == {}
    for number in (1, 2, 5):
        factors = random_factors(number)
        write_lost(state, "p" * 64, number, {module: Lost(factors, A_RI) for module in SHAPES})
    assert sorted(path.name for path in state.iterdir()) == ["lost-0000002.safetensors", "lost-0000005.safetensors"]
    for number, newest in ((3, 2), (5, 2), (6, 5), (9, 5)):
        read = read_lost(state, "p" * 64, number, wire(A_RI))
        assert list(read) == list(SHAPES)
        assert all(map(torch.equal, read["layers.1.q"], random_factors(newest)))
    # A run that was started over: what it had before is of no use.
    write_lost(state, "p" * 64, 1, {module: Lost(random_factors(1), A_RI) for module in SHAPES})
    assert [path.name for path in state.iterdir()] == ["lost-0000001.safetensors"]


def test_what_another_federation_lost_is_refused(tmp_path):
    A_RI = random_factors(0).A_RI
    write_lost(tmp_path, "p" * 64, 1, {module: Lost(random_factors(1), A_RI) for module in SHAPES})
    with pytest.raises(ArtifactError, match=r"pppppppppppp…; expected one of qqqqqqqqqqqq…"):
        read_lost(tmp_path, "q" * 64, 2, wire(A_RI))
    (tmp_path / "lost-0000001.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        read_lost(tmp_path, "p" * 64, 2, wire(A_RI))


def test_training_starts_with_what_was_lost():
    one, two, lost = random_factors(0), random_factors(1), random_factors(2)
    start = with_lost({"a": one, "b": two}, {"b": lost})
    assert start["a"] is one
    assert torch.equal(start["b"].B_OR, two.B_OR + lost.B_OR)
