"""Held-out shares and splits among clients."""

import re
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedlarge.config import DataConfig
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.partition import hold_out, split_by_column, split_by_config, split_dirichlet, split_iid

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
quick = settings(max_examples=25, deadline=None)


def numbered(count, labels="abc"):
    return Dataset.from_dict(
        {"text": [f"t{i}" for i in range(count)], "label": [labels[i % len(labels)] for i in range(count)]}
    )


def assert_partition(dataset, clients):
    assert all(len(part) for part in clients.values())
    assert all(CLIENT_NAME.fullmatch(name) for name in clients)
    assert sorted(text for part in clients.values() for text in part["text"]) == sorted(dataset["text"])


# Holding out


@quick
@given(count=st.integers(1, 60), fraction=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**32))
def test_held_out_examples_are_the_wanted_share_and_no_other(count, fraction, seed):
    dataset = numbered(count)
    train, held_out = hold_out(dataset, fraction, seed)
    if fraction == 0 or count == 1:
        assert train is dataset
        assert held_out is None
        return
    assert len(held_out) == min(max(round(fraction * count), 1), count - 1)
    assert_partition(dataset, {"train": train, "heldout": held_out})
    less, few = hold_out(dataset, fraction, seed, at_most=2)
    assert few.to_list() == held_out.to_list()[:2]  # the same, and what isn't used is trained on
    assert_partition(dataset, {"train": less, "heldout": few})
    assert hold_out(dataset, fraction, seed, at_most=0) == (dataset, None)
    assert [part.to_list() for part in hold_out(dataset, fraction, seed)] == [train.to_list(), held_out.to_list()]


def test_another_seed_holds_out_other_examples():
    assert hold_out(numbered(100), 0.2, 0)[1]["text"][:] != hold_out(numbered(100), 0.2, 1)[1]["text"][:]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"The held-out fraction is .*; it must be at least 0 and below 1."):
        hold_out(numbered(5), fraction, 0)


# Splitting


@quick
@given(values=st.lists(st.text("ab Zé/-_.7", min_size=1, max_size=6), min_size=1, max_size=12))
def test_split_by_column_keeps_every_example_once_or_refuses(values):
    dataset = Dataset.from_dict({"text": [f"t{i}" for i in range(len(values))], "team": values})
    try:
        clients = split_by_column(dataset, "team")
    except DataError:
        return
    assert_partition(dataset, clients)
    assert list(clients) == sorted(clients)
    assert len(clients) == len(set(values))
    assert all(len(set(part["team"])) == 1 for part in clients.values())


def test_client_names_come_from_the_values():
    dataset = Dataset.from_dict({"text": list("abcde"), "team": ["_Zürich / 1", "x" * 200, "b", "a", "b"]})
    clients = split_by_column(dataset, "team")
    assert list(clients) == ["Zurich-1", "a", "b", "x" * 128]
    assert clients["b"]["text"][:] == ["c", "e"]
    assert list(split_by_column(Dataset.from_dict({"text": ["a", "b"], "n": [10, 9]}), "n")) == ["10", "9"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["a b", "a/b"], "'a b' and 'a/b' in column team both give the client name a-b."),
        (["x" * 128, "x" * 129], "both give the client name"),
        (["東京", "a"], "The value '東京' of column team has no ASCII letter or digit to name a client by."),
        (["a", None], "Row 2 has None in column team; expected a string or a number."),
        ([["a"], ["b"]], r"Row 1 has \['a'\] in column team"),
    ],
)
def test_values_that_name_no_client_are_refused(values, sentence):
    with pytest.raises(DataError, match=sentence):
        split_by_column(Dataset.from_dict({"text": ["a", "b"], "team": values}), "team")


@quick
@given(
    count=st.integers(1, 60),
    labels=st.sampled_from(["a", "ab", "aaaaaaab", "abcdefghij"]),
    share=st.floats(0, 1),
    alpha=st.sampled_from([1e-6, 0.01, 0.5, 10.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_random_splits_keep_every_example_once_and_repeat(count, labels, share, alpha, seed):
    dataset = numbered(count, labels)
    clients = 1 + round(share * (count - 1))
    for split in (
        lambda: split_iid(dataset, clients, seed),
        lambda: split_dirichlet(dataset, "label", clients, alpha, seed),
    ):
        parts = split()
        assert_partition(dataset, parts)
        assert list(parts) == [f"client-{i:03d}" for i in range(clients)]
        sizes = [len(part) for part in parts.values()]
        assert max(sizes) - min(sizes) <= 1
        assert [part["text"][:] for part in split().values()] == [part["text"][:] for part in parts.values()]


def test_alpha_sets_the_skew():
    dataset = numbered(4000, "abcd")

    def largest_share(alpha):
        parts = split_dirichlet(dataset, "label", 20, alpha, 0).values()
        return sum(max(Counter(part["label"]).values()) for part in parts) / len(dataset)

    shares = [largest_share(alpha) for alpha in (0.01, 0.5, 4.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.35  # 0.25 would be perfectly even


def test_impossible_splits_are_refused():
    dataset = numbered(3)
    for clients in (0, 4):
        with pytest.raises(ConfigError, match=f"{clients} clients can't share 3 examples; each needs at least one."):
            split_iid(dataset, clients, 0)
        with pytest.raises(ConfigError, match=f"{clients} clients can't share 3 examples"):
            split_dirichlet(dataset, "label", clients, 1.0, 0)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"The Dirichlet alpha is .*; it must be positive, from 1e-6 to 1e6."):
            split_dirichlet(dataset, "label", 2, alpha, 0)
    for split in (lambda: split_by_column(dataset, "x"), lambda: split_dirichlet(dataset, "x", 2, 1.0, 0)):
        with pytest.raises(ConfigError, match=r"There is no column x; the data has text, label."):
            split()


# What a federation file says


@pytest.fixture
def letters():
    return Dataset.from_dict({"text": list("abcdef"), "team": ["x", "x", "x", "y", "y", "z"]})


def test_a_count_of_column_clients_takes_the_largest(letters):
    config = DataConfig(source="stdlib", split="column", column="team", clients=2)
    assert list(split_by_config(letters, config, seed=0)) == ["x", "y"]


def test_named_column_clients_are_taken(letters):
    config = DataConfig(source="stdlib", split="column", column="team", clients=["z", "x"])
    assert {name: len(part) for name, part in split_by_config(letters, config, seed=0).items()} == {"x": 3, "z": 1}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "column"}, "needs data.column"),
        ({"split": "column", "column": "tem"}, "'tem' is not there"),
        ({"split": "iid"}, "needs data.clients"),
        ({"split": "dirichlet", "column": "team"}, "needs data.clients"),
        ({"split": "column", "column": "team", "clients": ["q"]}, "names 'q'"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(letters, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        split_by_config(letters, DataConfig(source="stdlib", **settings), seed=0)
