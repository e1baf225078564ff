"""What a server and its clients tell each other through a store: small JSON documents, bounded before they are parsed.

    order.json                              what the federation asks for now; only the server writes it
    check_ins/CLIENT.json                   a client that is there
    inbox/0001/CLIENT/1/                    its update for an attempt at a round, or failed.json; whole.json, where it
                                            fetched the whole adapter though the order has what changed for it;
                                            package.json, where it fetched the package after the first round
    verdicts/0001/CLIENT/1.json             what became of that, for this client alone; only the server writes it
    secure/0001/1/                          with secure aggregation: who takes part, and what each client is to get

With secure aggregation an order is for one stage of a round, and the inbox has a client's other messages, too.

An order says how to train, and a client does what it says on its own machine: so it may hold these training arguments
and no others, within these bounds. What names files, loads code, reports or pushes somewhere isn't among them. What the
server says may be signed (`voice.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import psutil
from pydantic import Field, ValidationError, model_validator

from hf_fedlarge.artifacts import MANIFEST_NAME
from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.config import ClientName, Codec, Record, first_problem
from hf_fedlarge.data import load_examples
from hf_fedlarge.entries import Count, DataFiles, Digest
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.keys import Signature
from hf_fedlarge.store import Store
from hf_fedlarge.untrusted import parse_json, printable

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and Windows' under WSL2
ORDER = "order.json"
CHECK_INS = "check_ins"
INBOX = "inbox"
VERDICTS = "verdicts"
SECURE = "secure"
FAILED = "failed.json"
WHOLE = "whole.json"
PACKAGE = "package.json"
KEYS, SHARES, AGREED, REVEALED = "keys.json", "shares.json", "agreed.json", "revealed.json"
ROSTER, AGREEMENT = "roster.json", "agreement.json"
PATIENCE_SECONDS = 7 * 86400.0  # that either side waits for the other
MAX_ORDER_BYTES = 4 * 2**20  # some ten thousand names
MAX_NOTE_BYTES = 2**15  # a reason of 2,000 letters, each as two escapes
# For each client that messages of secure aggregation are about: all of them together say less of one of 128 letters.
CLIENT_BYTES = 2048

_Steps = Annotated[int, Field(ge=1, le=10**6)]
_Batch = Annotated[int, Field(ge=1, le=4096)]
_Share = Annotated[float, Field(ge=0, le=1)]
RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Reason = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,2000}$")]
# Without fsspec's chains (`a::b`), of which other links than the first could be anything.
StoreUrl = Annotated[str, Field(pattern=r"^(:?[^\x00-\x1f\x7f-\x9f:]){1,1000}$")]


class TrainingOrder(Record):
    """The training arguments that a client takes from an order: trl's, with bounds."""

    learning_rate: _Share | None = None
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] | None = None
    warmup_steps: Annotated[float, Field(ge=0, le=10**6)] | None = None
    max_steps: _Steps | None = None
    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    per_device_train_batch_size: _Batch | None = None
    per_device_eval_batch_size: _Batch | None = None
    gradient_accumulation_steps: _Batch | None = None
    max_length: Annotated[int, Field(ge=1, le=2**20)] | None = None
    packing: bool | None = None
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] | None = None
    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    optim: (
        Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "adagrad", "rmsprop", "sgd"] | None
    ) = None
    adam_beta1: _Share | None = None
    adam_beta2: _Share | None = None
    adam_epsilon: _Share | None = None
    weight_decay: _Share | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=10**6)] | None = None
    neftune_noise_alpha: Annotated[float, Field(ge=0, le=100)] | None = None
    bf16: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    save_strategy: Literal["no", "steps"] | None = None
    save_steps: _Steps | None = None
    logging_strategy: Literal["no", "steps", "epoch"] | None = None
    logging_steps: _Steps | None = None
    disable_tqdm: bool | None = None


class Said(Record):
    """What a server says, with a signature of all the rest if it has a key."""

    prefix: ClassVar[bytes]
    signature: Signature | None = None

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is of: a prefix that nothing else begins with, and canonical JSON."""
        body = self.model_dump(mode="json", exclude={"signature"})
        return self.prefix + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


class Change(Record):
    """What changed in an adapter since the one `since`, which `clients` should have from the round before.

    `files` are those of its files of which only some tensors changed, each with the file of these
    (`traffic.write_changes`); files that are the same are not fetched, others are fetched whole.
    """

    since: Digest
    files: DataFiles
    clients: list[ClientName]


class Work(Record):
    """What clients of one tier are given, and what they may send back.

    `package_bytes` and `adapter_bytes` are what will be downloaded at the most, `update_bytes` what will be taken.
    `package_store` is the store that has the package, for orders that don't come through one. `change` is what spares
    those who have the adapter of the round before to fetch all of it.
    """

    clients: list[ClientName]
    package: Digest
    package_bytes: Count
    package_store: StoreUrl | None = None
    adapter: Digest
    adapter_bytes: Count
    update_bytes: Count
    change: Change | None = None


Stage = Literal["keys", "shares", "masked", "agree", "reveal"]
_ANSWERS = {"keys": KEYS, "shares": SHARES, "masked": MANIFEST_NAME, "agree": AGREED, "reveal": REVEALED}


class SecureOrder(Record):
    """What secure aggregation asks of clients now (`secagg.py`), and how they make whole numbers of their changes.

    Numbers are clipped to ± `limit`. A client weighs as `weighting` says, which is at most `most`. `sharers` and
    `survivors` are those who came through the stages before, and `roster` is the digest of the list of their keys.
    """

    stage: Stage
    limit: Annotated[float, Field(gt=0, le=2**20)]
    weighting: Literal["equal", "tokens", "examples"]
    most: Annotated[int, Field(ge=1, le=2**53)]
    roster: Digest | None = None
    sharers: list[ClientName] = []
    survivors: list[ClientName] = []


_TERMS = {"training", "seed", "proximal", "eval_examples", "codec"}  # all that an order says about how to train


class OrderDocument(Said):
    """What a federation asks for now.

    `run` tells one federation's orders from another's in the same store. A round is `open` until `closes_at`, in
    seconds since 1970 by the server's clock (None: until it is closed); `over` says that there are no more rounds, and
    `adapter` what came of them. `late` is what becomes of updates that come after the round was closed.
    """

    prefix: ClassVar[bytes] = b"hf-fedlarge order v1\n"
    format_version: Literal[1] = 1
    run: RunId
    state: Literal["open", "closed", "over"]
    round: Count
    attempt: Count
    work: list[Work] = []
    training: TrainingOrder = TrainingOrder()
    seed: Count = 0
    proximal: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    eval_examples: Count = 0
    codec: Codec = Codec()
    late: Literal["refuse", "buffer"] = "refuse"
    closes_at: float | None = None
    adapter: Digest | None = None
    secure: SecureOrder | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.secure and len(self.work) != 1:
            raise ValueError(
                f"it gives {len(self.work)} kinds of work; expected one, the same for all, where it is secure"
            )
        return self

    @property
    def context(self) -> str:
        """What keys and masks of secure aggregation are for: the attempt, and a digest of all that an order asks in it.

        So clients that were told to train otherwise, from another adapter, or to round or weigh otherwise, have other
        masks, which don't vanish from their sum.
        """
        how = self.secure.model_dump(mode="json", include={"limit", "weighting", "most"})
        return f"{self.run}/{self.round}/{self.attempt}/{_digest([self.terms(self.work[0]), how])}"

    def terms(self, work: Work) -> str:
        """A digest of all that decides what training for this order and this work gives."""
        return _digest([self.model_dump(mode="json", include=_TERMS), work.package, work.adapter])

    @property
    def step(self) -> tuple[str, int, int, str]:
        """What can be answered once: an attempt, or a stage of it."""
        return *self.attempt_id, self.secure.stage if self.secure else ""

    def goes_on(self, step: tuple[str, int, int, str]) -> bool:
        """Whether there may be more to answer of the attempt that a step is of; when one stage's time is over, too."""
        return self.state == "open" and self.attempt_id == step[:3]

    @property
    def time(self) -> tuple[int, bool, int, int]:
        """When in its federation it is: round, whether all is over after that, attempt, stage. It never goes back."""
        stage = list(_ANSWERS).index(self.secure.stage) if self.secure else 0
        return self.round, self.state == "over", self.attempt, stage

    @property
    def answer_name(self) -> str:
        """The file that completes an answer in the inbox."""
        return _ANSWERS[self.secure.stage] if self.secure else MANIFEST_NAME

    @property
    def is_later_stage(self) -> bool:
        """Whether who answers has trained for it already."""
        return self.secure is not None and self.secure.stage != "keys"

    @property
    def is_last_stage(self) -> bool:
        """Whether who answers has done all that the round asks for."""
        return self.secure is None or self.secure.stage == "reveal"

    @property
    def attempt_id(self) -> tuple[str, int, int]:
        """Which attempt at which round of which federation it is about."""
        return self.run, self.round, self.attempt

    @property
    def is_open(self) -> bool:
        """Whether an update would still be in time, by this machine's clock."""
        return self.state == "open" and time.time() < (math.inf if self.closes_at is None else self.closes_at)

    def work_of(self, client: str) -> Work | None:
        """What a client is asked for; None: nothing."""
        return next((work for work in self.work if client in work.clients), None)


class CheckInDocument(Record):
    """What a client says of itself: how many examples it has at most, and this much memory, in bytes."""

    client: ClientName
    examples: Annotated[int, Field(ge=1, le=10**9)]
    memory_bytes: Count | None = None


class FailureDocument(Record):
    """Why a client gives no update, or fetched a whole adapter or a package."""

    reason: Reason


class VerdictDocument(Said):
    """What became of a client's update for an attempt at a round: it counts, or the cause why it doesn't.

    It names nobody but its client.
    """

    prefix: ClassVar[bytes] = b"hf-fedlarge verdict v1\n"
    run: RunId
    client: ClientName
    round: Count
    attempt: Count
    cause: Reason | None = None

    @property
    def sentence(self) -> str:
        """As it is reported."""
        return f"round {self.round}: " + (f"the server says: {self.cause}" if self.cause else "the update counts")


DocumentT = TypeVar("DocumentT", bound=Record)


def _digest(said: list[Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def inbox(round_number: int, client: str | None = None, attempt: int | None = None) -> str:
    """Where the updates of a round go, or one client's for an attempt at it."""
    home = f"{INBOX}/{round_number:04d}"
    return home if client is None else f"{home}/{client}/{attempt}"


def verdict(round_number: int, client: str, attempt: int) -> str:
    """Where a client learns what became of its update."""
    return f"{VERDICTS}/{round_number:04d}/{client}/{attempt}.json"


def one_line(reason: str) -> str:
    """A reason as a document may hold it."""
    return printable(reason)[:2000] or "no reason given"


def describe_client(client: str, data: str, memory_budget: str | None = None) -> CheckInDocument:
    """What a client says of itself when it checks in: its memory is its machine's, its GPU's or its budget, the least.

    Raises:
        ConfigError: a name that can't be a client's, or a budget that is none.
        DataError: the examples can't be read.
    """
    memory = psutil.virtual_memory().total
    if any(map(os.path.exists, _GPU_DRIVERS)):  # else torch, which takes seconds to load, need not be asked
        from hf_fedlarge.memory import gpu_bytes

        memory = min(memory, gpu_bytes())
    if memory_budget is not None:
        memory = min(memory, parse_bytes(memory_budget))
    try:
        return CheckInDocument(client=client, examples=len(load_examples(data)), memory_bytes=memory)
    except ValidationError as error:
        raise ConfigError(f"--client or --data is wrong: {first_problem(error)}.") from error


def failure(reason: str) -> FailureDocument:
    """Why there is no update, shortened and made printable."""
    return FailureDocument(reason=one_line(reason))


def secure(round_number: int, attempt: int | None = None) -> str:
    """Where the server leaves what clients get in an attempt at a round with secure aggregation, or in all of them."""
    home = f"{SECURE}/{round_number:04d}"
    return home if attempt is None else f"{home}/{attempt}"


def boxes_name(client: str) -> str:
    """Where, in the home of an attempt, the boxes for a client are; a client may have any name."""
    return f"boxes/{client}.json"


def as_bytes(document: Record) -> bytes:
    """A document as it is written."""
    return (json.dumps(document.model_dump(mode="json", exclude_none=True), indent=1) + "\n").encode()


def write_document(store: Store, path: str, document: Record) -> None:
    """Write a document.

    Raises:
        StoreError: the store can't be written.
    """
    store.write(path, as_bytes(document))


def read_document(store: Store, path: str, kind: type[DocumentT], most_bytes: int | None = None) -> DocumentT | None:
    """A document that somebody else wrote; None if there is none.

    Args:
        store: where it lies.
        path: as what.
        kind: what it must be.
        most_bytes: that it may have; None: as an order may, or a note.

    Raises:
        ArtifactError: it is too long, or isn't a document of this kind; the message names the key.
        StoreError: the store can't be read.
    """
    raw = store.read(path, most_bytes or (MAX_ORDER_BYTES if kind is OrderDocument else MAX_NOTE_BYTES))
    if raw is None:
        return None
    where = f"{store.url}/{path}"
    try:
        return kind.model_validate(parse_json(raw, where))
    except ValidationError as error:
        raise ArtifactError(f"{where} is refused: {first_problem(error)}.") from error


def training_order(training: dict[str, Any]) -> TrainingOrder:
    """A federation's training arguments as an order's.

    Raises:
        ConfigError: one that clients don't take from an order, or beyond its bounds.
    """
    try:
        return TrainingOrder.model_validate(training)
    except ValidationError as error:
        raise ConfigError(
            f"The federation's training arguments can't be ordered of clients: {first_problem(error)}; clients take "
            f"{', '.join(TrainingOrder.model_fields)}."
        ) from error
