"""Hold examples out, and split the rest among simulated clients."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_fedlarge.config import DataConfig
from hf_fedlarge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_MAX_NAME = 128  # an update's manifest takes no longer client name


def hold_out(
    dataset: Dataset, fraction: float, seed: int, at_most: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """Shuffle by `seed`, then set `fraction` of the examples aside for evaluation, at least one and never all.

    Args:
        dataset: the examples.
        fraction: in [0, 1).
        seed: of the order.
        at_most: examples that are used, so that no more are set aside; None: all are.

    Returns:
        The rest and the held-out examples; the data set as it was and None where none are wanted, or of one example.

    Raises:
        ConfigError: the fraction is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"The held-out fraction is {fraction}; it must be at least 0 and below 1.")
    total = len(dataset)
    at_most = total if at_most is None else at_most
    if fraction == 0 or total < 2 or at_most <= 0:
        return dataset, None
    size = min(max(round(fraction * total), 1), total - 1, at_most)
    order = np.random.default_rng(seed).permutation(total)
    return dataset.select(order[size:]), dataset.select(order[:size])


def split_by_column(dataset: Dataset, column: str) -> dict[str, Dataset]:
    """Make one client of each value of `column`, sorted by name, examples in their order.

    A client's name is the value without accents, other characters than ASCII letters, digits, `.`, `_` and `-` turned
    into `-`, without leading punctuation, cut at 128 characters.

    Raises:
        ConfigError: no such column.
        DataError: a value is missing, gives no name, or gives the same name as another value.
    """
    values: dict[str, str] = {}
    rows: dict[str, list[int]] = {}
    for index, value in enumerate(_labels(dataset, column)):
        plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:_MAX_NAME]
        if not name:
            raise DataError(f"The value {value!r} of column {column} has no ASCII letter or digit to name a client by.")
        if values.setdefault(name, value) != value:
            raise DataError(f"{values[name]!r} and {value!r} in column {column} both give the client name {name}.")
        rows.setdefault(name, []).append(index)
    return {name: dataset.select(rows[name]) for name in sorted(rows)}


def split_iid(dataset: Dataset, clients: int, seed: int) -> dict[str, Dataset]:
    """Deal the shuffled examples out to `clients` clients, whose sizes differ by at most one.

    Raises:
        ConfigError: fewer than one client, or more clients than examples.
    """
    _check_clients(dataset, clients)
    order = np.random.default_rng(seed).permutation(len(dataset))
    return _numbered(dataset, np.array_split(order, clients))


def split_dirichlet(dataset: Dataset, column: str, clients: int, alpha: float, seed: int) -> dict[str, Dataset]:
    """Give each client its own mix of the labels in `column`, as in Hsu et al. 2019 (arXiv 1909.06335).

    Client by client, a mix q ~ Dirichlet(alpha · p), p being the labels' shares of all examples, says which labels the
    client's examples are drawn from, without replacement. A label that has run out leaves the mix; when all of the
    mix has run out, the client takes what is left in its proportions. Clients have equal sizes up to one example, so
    that none is empty; the last ones get leftovers and follow their mix less.

    A small alpha skews (0.1: a few labels a client), a large one doesn't (100: all clients nearly alike).

    Raises:
        ConfigError: no such column, alpha outside 1e-6 to 1e6, fewer than one client, or more clients than examples.
        DataError: a label is missing.
    """
    _check_clients(dataset, clients)
    if not 1e-6 <= alpha <= 1e6:  # beyond, floats run out before the skew changes
        raise ConfigError(f"The Dirichlet alpha is {alpha}; it must be positive, from 1e-6 to 1e6.")
    generator = np.random.default_rng(seed)
    labels = _labels(dataset, column)
    number = {label: index for index, label in enumerate(sorted(set(labels)))}
    label_of = np.array([number[label] for label in labels])
    totals = np.bincount(label_of)
    pools = [generator.permutation(np.flatnonzero(label_of == label)) for label in range(len(totals))]
    left = totals.copy()
    prior = totals / totals.sum()
    parts = []
    for size in (len(share) for share in np.array_split(label_of, clients)):
        mix = generator.dirichlet(alpha * prior)
        part: list[int] = []
        while len(part) < size:
            weights = np.where(left > 0, mix, 0.0)
            if weights.sum() == 0.0:
                weights = left.astype(float)
            wanted = generator.multinomial(size - len(part), weights / weights.sum())
            for label, count in enumerate(np.minimum(wanted, left)):
                part += pools[label][left[label] - count : left[label]].tolist()
                left[label] -= count
        parts.append(part)
    return _numbered(dataset, parts)


def split_by_config(dataset: Dataset, config: DataConfig, seed: int) -> dict[str, Dataset]:
    """Split among clients as a federation's `data` section says; `clients` may name a subset of a column's values.

    Raises:
        ConfigError: a setting that this way of splitting needs is missing, or a client that is not there.
    """
    needs_column, needs_count = config.split != "iid", config.split != "column"
    if needs_column and config.column is None:
        raise ConfigError(f"data.split {config.split} needs data.column; the columns are {dataset.column_names}.")
    if needs_column and config.column not in dataset.column_names:
        raise ConfigError(f"data.column {config.column!r} is not there; the columns are {dataset.column_names}.")
    if needs_count and not isinstance(config.clients, int):
        raise ConfigError(f"data.split {config.split} needs data.clients, the number of clients.")
    if config.split == "iid":
        return split_iid(dataset, config.clients, seed)
    if config.split == "dirichlet":
        return split_dirichlet(dataset, config.column, config.clients, config.alpha, seed)
    clients = split_by_column(dataset, config.column)
    if isinstance(config.clients, list):
        for name in config.clients:
            if name not in clients:
                raise ConfigError(
                    f"data.clients names {name!r}, which {config.column} lacks; there are {len(clients)}."
                )
        return {name: clients[name] for name in sorted(config.clients)}
    if config.clients is not None:
        # The ones with the most examples; ties go by name.
        largest = sorted(clients, key=lambda name: (-len(clients[name]), name))[: config.clients]
        return {name: clients[name] for name in sorted(largest)}
    return clients


def _labels(dataset: Dataset, column: str) -> list[str]:
    if column not in dataset.column_names:
        raise ConfigError(f"There is no column {column}; the data has {', '.join(dataset.column_names)}.")
    values = dataset[column][:]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int | float):
            raise DataError(f"Row {number} has {value!r:.40} in column {column}; expected a string or a number.")
    return [str(value) for value in values]


def _check_clients(dataset: Dataset, clients: int) -> None:
    if not 1 <= clients <= len(dataset):
        raise ConfigError(f"{clients} clients can't share {len(dataset)} examples; each needs at least one.")


def _numbered(dataset: Dataset, parts: Iterable[Sequence[int]]) -> dict[str, Dataset]:
    return {f"client-{number:03d}": dataset.select(part) for number, part in enumerate(parts)}
