"""What each client gets in a round, and what it may send back: its tier's package, the adapter, and bounds."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.clients import read_check_ins
from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.collect import expected_from
from hf_fedlarge.config import Codec, FederationConfig
from hf_fedlarge.entries import FileEntry
from hf_fedlarge.experience import Past, Terms, last_paces
from hf_fedlarge.fixed_point import WORD_BYTES
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import MAX_SIGNATURE_BYTES, AllowedKeys, make_allowed, read_allowed
from hf_fedlarge.orders import CLIENT_BYTES, MAX_NOTE_BYTES
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.secure_sum import count_words
from hf_fedlarge.tier_packages import Tier, batch, max_length
from hf_fedlarge.tiers import Pace, derive_adapter, describe_pace
from hf_fedlarge.traffic import Budget, changed_bytes, write_changes
from hf_fedlarge.update import MAX_SMALL_BYTES, Asked, Expected, update_bytes

Down = Literal["changed", "offered"]
"""What goes down of adapters: what changed since a client was last asked; or what changed since the round before to
clients that surely have its adapter, and all of it to others."""


@dataclass(frozen=True)
class ClientJob:
    """What one client is asked to do in one round: directories and files in, an update directory out."""

    client: str
    round: int
    package: Path
    adapter: Path
    data: Path
    eval_data: Path | None
    output: Path
    training: dict[str, Any]
    proximal: float = 0.0
    eval_examples: int = 64
    codec: Codec = field(default_factory=Codec)
    state: Path | None = None
    key: Path | None = None


Train = Callable[[ClientJob], None]


class Jobs:
    """The jobs of a run.

    Args:
        config: the federation.
        run: its directory; the package is in it already.
        adapter_of: the adapter directory of a round.
        tiers: from the one of most memory down; the first has `run/package`.
        journal: the run's, which knows how long clients trained; None: they are all fast enough.
    """

    def __init__(
        self,
        config: FederationConfig,
        run: Path,
        adapter_of: Callable[[int], Path],
        tiers: list[Tier],
        journal: Journal | None = None,
    ) -> None:
        self.config, self.run, self._adapter_of, self.tiers = config, run, adapter_of, tiers
        self._journal = journal
        self._paces: dict[int, dict[str, Past]] = {}
        self._terms = Terms(journal) if journal else None
        # The same for all clients of a tier, and reading two adapters or a package's config takes a while.
        self._changed_bytes = functools.cache(changed_bytes)
        self._write_changes = functools.cache(write_changes)
        self._expected: dict[tuple[int, str], Expected] = {}

    @cached_property
    def check_ins(self) -> dict[str, CheckIn]:
        """The clients that are there now, by name."""
        return {check_in.client: check_in for check_in in read_check_ins(self.run)}

    def read_check_ins(self) -> None:
        """Look again who is there."""
        self.__dict__.pop("check_ins", None)

    @property
    def least_bytes(self) -> int:
        """The memory below which a client can't take part."""
        return self.tiers[-1].memory_bytes

    def tier_of(self, client: str, number: int) -> Tier:
        """The first tier that a client has memory for, and can be expected to end before the deadline.

        A client that was asked in the round keeps the tier that it was asked under. One that doesn't say what memory
        it has is taken to have enough, and one that has not trained yet to be fast enough. Where no tier is fast
        enough it gets the smallest.
        """
        if (found := self._asked_under(client, number)) is not None:
            return found
        return next(
            (tier for tier in self._able(client, number) if self._is_fast_enough(client, tier, number)), self.tiers[-1]
        )

    def _asked_under(self, client: str, number: int) -> Tier | None:
        """None: it wasn't asked, or before the journal kept the tier."""
        index = self._terms.tier(client, number) if self._terms and len(self.tiers) > 1 else None
        return None if index is None else self.tiers[index]

    def _said(self, client: str, number: int) -> CheckIn:
        """What a client said of itself when it was drawn for a round; of one that was not, what it says now."""
        return (self._terms and self._terms.check_in(client, number)) or self.check_ins[client]

    def _able(self, client: str, number: int) -> list[Tier]:
        memory = self._said(client, number).memory_bytes
        return [tier for tier in self.tiers if memory is None or tier.memory_bytes <= memory] or self.tiers[-1:]

    def _is_fast_enough(self, client: str, tier: Tier, number: int) -> bool:
        seconds = self._seconds(client, tier, number)
        return seconds is None or seconds < self._deadline(number)

    def _deadline(self, number: int) -> float | None:
        deadline = self.config.deadline_seconds
        return self._terms.deadline(number, deadline) if self._terms else deadline

    def _seconds(self, client: str, tier: Tier, number: int) -> float | None:
        """How long a client would train with a tier's package: as long as the last time, by the bytes of the two."""
        if (past := self._past(client, number)) is None:
            return None
        then = self._asked_under(client, past.round) or self._able(client, past.round)[0]
        return past.seconds * (tier.manifest.total_bytes / then.manifest.total_bytes)

    def _past(self, client: str, number: int) -> Past | None:
        if self._deadline(number) is None or self._journal is None or len(self.tiers) == 1:
            return None
        if number not in self._paces:  # the journal before a round that has begun doesn't change
            self._paces[number] = last_paces(self._journal, number, self._deadline(number))
        return self._paces[number].get(client)

    def describe_pace(self, client: str, number: int) -> str | None:
        """What is to be said of a client that gets a smaller tier than its memory is enough for; None: it doesn't."""
        able, tier, past = self._able(client, number), self.tier_of(client, number), self._past(client, number)
        if past is None or self.tiers.index(tier) <= self.tiers.index(able[0]):
            return None
        above = self.tiers[self.tiers.index(tier) - 1]
        pace = Pace(*(self._seconds(client, one, number) for one in (tier, above)), past.missed)
        memory = self._said(client, number).memory_bytes or able[0].memory_bytes
        training = self._trainings(number)[-1]
        tokens = batch(training) * max_length(training)
        said = describe_pace(pace, memory, tokens, self._deadline(number), tier.manifest, tier.lora)
        return f"{client}: {said}"

    def adapter(self, tier: Tier, number: int) -> Path:
        """What the tier's clients start round `number` from; a smaller tier's is made of the first one's."""
        parent = self._adapter_of(number - 1)
        if tier is self.tiers[0]:
            return parent
        part = parent.with_name("tiers") / tier.name
        if not part.exists():
            derive_adapter(parent, tier.package, tier.lora, part)
        return part

    def derived(self, number: int) -> dict[Path, Path]:
        """Adapter → package of the tiers below the first, as they start round `number`."""
        return {self.adapter(tier, number): tier.package for tier in self.tiers[1:]}

    def job(self, client: str, number: int, output: Path) -> ClientJob:
        """What a client is asked to do."""
        home, tier = self.run / "clients" / client, self.tier_of(client, number)
        held_out = home / "held_out.jsonl"
        return ClientJob(
            client=client,
            round=number,
            package=tier.package,
            adapter=self.adapter(tier, number),
            data=home / "train.jsonl",
            eval_data=held_out if held_out.exists() else None,
            output=output,
            training=training_of(client, number, self.config.seed, self._trainings(number)[-1]),
            proximal=self.config.proximal,
            eval_examples=self.config.client_eval_examples,
            codec=self.config.wire_codec,
            state=home / "state" if self.config.scaffold or self.config.codec != "fp32" else None,
            key=home / "key.pem" if self.config.keys else None,
        )

    def expected(self, client: str, number: int) -> Expected:
        """What its update must agree with, by the list of keys as it is now."""
        expected = self._of_tier(self.tier_of(client, number), number)
        return replace(expected, asked=self.asked(client, number), keys=self._allowed_keys())

    def make_keys(self) -> None:
        """With `keys: auto`, make a key for each simulated client, once."""
        if self.config.keys == "auto":
            make_allowed(self._key_list, {name: self.run / "clients" / name / "key.pem" for name in self.check_ins})

    @property
    def _key_list(self) -> Path:
        return self.run / "allowed_keys.json" if self.config.keys == "auto" else Path(self.config.keys)

    def _allowed_keys(self) -> AllowedKeys | None:
        return read_allowed(self._key_list) if self.config.keys else None

    def _of_tier(self, tier: Tier, number: int) -> Expected:
        expected = self._expected.get((number, tier.name))
        if expected is None:
            directory = self.adapter(tier, number)
            adapter = read_manifest(directory, AdapterManifest)
            codec = self.config.wire_codec
            expected = expected_from(directory, adapter, tier.package, number, codec)
            if self.config.secure:
                expected = replace(expected, words=count_words(expected, adapter.trains))
            # Late updates are for the round before; nothing older comes.
            last = {key: known for key, known in self._expected.items() if key[0] >= number - 1}
            self._expected = last | {(number, tier.name): expected}
        return expected

    def asked(self, client: str, number: int) -> Asked:
        """What a client can have trained on at the most: its examples, as often as the training arguments say.

        No example makes more than one sequence, unless packing splits it; then `max_steps` is given (`coherence.py`).
        Of a round's attempts, whose updates all count, it is the one that asks for most.
        """
        examples = self._said(client, number).examples

        def tokens(training: dict[str, Any]) -> int:
            steps, passes = training["max_steps"], math.ceil(training["num_train_epochs"])
            sequences = steps * batch(training) if steps > 0 else passes * examples
            return sequences * training["max_length"]

        most = max(tokens(TRAINING_DEFAULTS | training) for training in self._trainings(number))
        return Asked(client=client, examples=examples, tokens=most)

    def _trainings(self, number: int) -> list[dict[str, Any]]:
        """The training arguments of a round's attempts, the last one's last; before there is one, those to come."""
        return (self._terms and self._terms.trainings(number)) or [self.config.training]

    def download_bytes(self, client: str, number: int, has: int | None, whole: bool = False) -> int:
        """What a client downloads for a round: what changed in its adapter, and the package if it lacks it.

        Args:
            client: its name.
            number: the round.
            has: the last round that it was asked in; None: it has nothing yet.
            whole: adapters go down as they are.
        """
        tier = self.tier_of(client, number)
        adapter = self.adapter(tier, number)
        if has is None:
            return tier.manifest.total_bytes + self._changed_bytes(adapter, None)
        return self._changed_bytes(adapter, None if whole else self.adapter(tier, has))

    def whole_bytes(self, client: str, number: int) -> int:
        """What a client downloads more that was to fetch what changed in its adapter and fetches all of it."""
        last = self.download_bytes(client, number, number - 1)
        return max(0, self.download_bytes(client, number, number - 1, whole=True) - last)

    def missing_bytes(self, journal: Journal, client: str, number: int, down: Down) -> int:
        """`download_bytes` of a client that was asked as the journal says.

        Args:
            journal: of the run.
            client: its name.
            number: the round.
            down: what goes down of adapters.
        """
        whole = down == "offered" and not self.is_offered(journal, client, number)
        return self.download_bytes(client, number, self.last_asked(journal, client, number), whole)

    def last_asked(self, journal: Journal, client: str, number: int) -> int | None:
        """The last round before `number` that a client was asked in and has the package of; None: there is none."""
        asked = [entry["round"] for entry in journal.find("asked", client=client) if entry["round"] < number]
        tier = self.tier_of(client, number)
        return next((past for past in reversed(asked) if self.tier_of(client, past) is tier), None)

    def has_previous(self, journal: Journal, client: str, number: int) -> bool:
        """Whether a client answered in the round before `number`, so that it has that round's adapter."""
        answered = journal.find("received", client=client, round=number - 1)
        return bool(answered) and self.tier_of(client, number - 1) is self.tier_of(client, number)

    def is_offered(self, journal: Journal, client: str, number: int) -> bool:
        """Whether what changed is offered to a client: it has the adapter before, and not every tensor changed."""
        return self.has_previous(journal, client, number) and bool(
            self.changes(self.tier_of(client, number), number)[1]
        )

    def changes(self, tier: Tier, number: int) -> tuple[Path, dict[str, FileEntry]]:
        """What changed in the tier's adapter since round `number` - 1: a directory, and its files."""
        directory = self._adapter_of(number - 1).with_name("changes") / f"{self.tiers.index(tier)}"
        return directory, self._write_changes(self.adapter(tier, number), self.adapter(tier, number - 1), directory)

    def check_budget(
        self, journal: Journal, clients: list[str], number: int, down: Down, late: Sequence[str] = ()
    ) -> None:
        """Refuse a round that could overstep the budget, before anything of it is sent.

        A client that is offered what changed may have lost what it had, so that the whole adapter goes down. A package
        that is fetched again is counted when it is, and there is no room for it before.

        Args:
            journal: of the run.
            clients: of whom the round waits.
            number: the round.
            down: what goes down of adapters.
            late: of whom an update for the round before may still come.

        Raises:
            BudgetError: it could.
        """
        if self.config.budget is None:
            return
        spent = sum(entry["bytes"] for entry in journal.find("asked", "received", "told"))
        asked = {entry["client"] for entry in journal.find("asked", round=number)}
        whole = {entry["client"] for entry in journal.find("told", round=number, what="adapter")}  # counted by now
        needed = 0
        for client in clients:
            if client not in asked:
                needed += self.missing_bytes(journal, client, number, down)
            if down == "offered" and client not in whole and self.is_offered(journal, client, number):
                needed += self.whole_bytes(client, number)
        needed += sum(self.upload_bytes(client, number) for client in clients)
        needed += sum(self.upload_bytes(client, number - 1) for client in late)
        if self.config.secure:
            needed += len(clients) * (MAX_NOTE_BYTES + CLIENT_BYTES * len(clients))
        Budget(parse_bytes(self.config.budget), spent).spend(needed, f"Round {number} with {len(clients)} clients")

    def upload_bytes(self, client: str, number: int) -> int:
        """The most that its update may have; a larger one is refused."""
        expected = self._of_tier(self.tier_of(client, number), number)
        if expected.words is not None:
            return expected.words * WORD_BYTES + MAX_SMALL_BYTES + (MAX_SIGNATURE_BYTES if self.config.keys else 0)
        codec = self.config.wire_codec
        tensors = update_bytes(expected.architecture, expected.package.kept_layers, expected.lora, codec)
        # A control variate is as large as an adapter in fp32, which it goes with.
        tensors *= 2 if expected.control else 1
        return tensors + 2 * MAX_SMALL_BYTES + (MAX_SIGNATURE_BYTES if self.config.keys else 0)


def training_of(client: str, number: int, seed: int, training: dict[str, Any]) -> dict[str, Any]:
    """A client's training arguments; its seed is the same whenever, and wherever, it trains for this round."""
    return {"seed": zlib.crc32(f"{seed}/{number}/{client}".encode()) % 2**31} | training
