"""What a user can set, checked where it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from hf_fedlarge.coherence import ON_FACTORS, ROBUST, check_federation, refuse
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.records import Record, checked, first_problem

Embeddings = Literal["int8", "nf4", "bf16"]
SurrogateCodec = Literal["nf4", "int8", "bf16"]
CodecName = Literal["fp32", "bf16", "int8", "nf4", "topk"]
TopkShare = Annotated[float, Field(gt=0, le=1)]
ClientName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class LoraSettings(Record):
    """The adapter's hyperparameters; `targets` None means every matrix of a block.

    A module's product B A counts `scale` times: alpha / r, or alpha / sqrt(r).
    """

    rank: Annotated[int, Field(ge=1, le=2**16)] = 16
    alpha: Annotated[float, Field(gt=0, le=2**20)] = 32.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)] | None = None

    @property
    def scale(self) -> float:
        """The factor before B A x (rsLoRA: arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Codec(Record):
    """How updates are encoded (`codec.py`): by name and, for `topk` alone, the share of a factor's entries sent."""

    name: CodecName = "fp32"
    topk_share: TopkShare = 0.05


def make_codec(name: str, topk_share: float) -> Codec:
    """The codec that a command line names.

    Raises:
        ConfigError: an unknown name, or a share that is not above 0 and up to 1.
    """
    try:
        return Codec(name=name, topk_share=topk_share)
    except ValidationError as error:
        raise ConfigError(f"The codec {name!r} of share {topk_share} is wrong: {first_problem(error)}.") from error


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `5e-4` is a number, which YAML 1.1 takes for a word, and a key stands once."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping before anything is merged into it; of a key that stands twice the last would count."""
        node, lines = super().compose_mapping_node(anchor), {}
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]  # nothing else can be a key
        for key in scalars:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value} stands in line {lines[key.value]} and again in line {line}")
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class DataConfig(Record):
    """Where the examples come from and how they are split among clients.

    `source` is a file, a `datasets` Hub id (with its `hub_split` and `hub_revision`) or `stdlib`; `split` is `column`
    (a client a value), `iid` or `dirichlet` (label skew over `column`). A share of each client's examples is held out
    for evaluation. `memory` is what the clients say they have, in turn (None: this machine's).
    """

    source: str
    hub_split: str = "train"
    hub_revision: str | None = None
    split: Literal["column", "iid", "dirichlet"] = "iid"
    column: str | None = None
    clients: list[str] | Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] = 0.5
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_examples: Annotated[int, Field(ge=2)] | None = None
    memory: Annotated[list[str], Field(min_length=1)] | None = None


class PackageSettings(Record):
    """How a checkpoint becomes a package.

    `keep_layers` is a count, a fraction or layer numbers, `layer_choice` how that many are chosen: evenly, or by what
    they do on calibration text. `keep_neurons` is the share of their neurons that those keep in the mean: more where
    they are missed more, or the same everywhere (`width_choice`). If only one of the two is given the other is 1; if
    none is, all layers stay with two thirds. `surrogate`, of rank `surrogate_rank`, stands for dropped layers.
    Fits are made on `calibration`, public text filled up with Python's documentation (None: that alone), and
    corrections of rank `heal_rank` by `heal_steps` on it (`heal.py`).
    """

    keep_layers: str | int | float | list[int] | None = None
    keep_neurons: float | None = None
    layer_choice: Literal["uniform", "influence", "loss", "gradient"] = "uniform"
    width_choice: Literal["error", "uniform"] = "error"
    surrogate: Literal["linear", "none"] = "linear"
    surrogate_codec: SurrogateCodec = "nf4"
    surrogate_rank: Annotated[int, Field(ge=1)] | None = None
    calibration: str | None = None
    heal_steps: Annotated[int, Field(ge=0)] = 0
    heal_rank: Annotated[int, Field(ge=1)] = 8
    embeddings: Embeddings = "int8"

    @property
    def kept(self) -> tuple[str | int | float | list[int], float]:
        """What stays: layers, and the share of the neurons of each."""
        if self.keep_layers is None:
            return 1.0, 2 / 3 if self.keep_neurons is None else self.keep_neurons
        return self.keep_layers, 1.0 if self.keep_neurons is None else self.keep_neurons


class SelectionSettings(Record):
    """Who trains in a round, and when it ends.

    `cohort` clients are wanted (None: all), drawn by `selection` (`plan.SELECTIONS`), and a share of `over_select` more
    for those that won't answer. A round ends with as many valid updates as wanted, when everybody was heard of, or
    `deadline_seconds` after the server took it up; with fewer than `min_updates` it is abandoned. What comes `late` is
    refused, or kept (`buffer`) for the next round that its client has no other update in, where it counts for less.
    """

    cohort: Annotated[int, Field(ge=1)] | None = None
    over_select: Annotated[float, Field(ge=0, le=10)] = 0.0
    selection: Literal["uniform", "data", "availability", "resources"] = "uniform"
    min_updates: Annotated[int, Field(ge=1)] = 1
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    late: Literal["refuse", "buffer"] = "refuse"


# What an attempt at a round was begun with holds to its end, so that the next one may go by other values: but for the
# deadline, which is that of the server that took the attempt up last.
ATTEMPT_SETTINGS = {"deadline_seconds", "late", "min_updates", "training"}
ADAPTIVE = ("adam", "yogi", "adagrad")
WEIGHTINGS = ("tokens", "examples", "equal", "loss")


class PrivacySettings(Record):
    """Client-level differential privacy (`docs/privacy.md`).

    Each client's change is clipped to the norm `clip`; their sum gets Gaussian noise of the standard deviation
    `noise_multiplier` · `clip`. What is spent is reported as an epsilon for `delta`, best well below 1 / clients.
    """

    clip: Annotated[float, Field(gt=0, le=2**20)]
    noise_multiplier: Annotated[float, Field(ge=0.01, le=2**20)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class SecureSettings(Record):
    """Secure aggregation: the server learns sums of updates, and none alone (`docs/privacy.md`).

    Numbers of a client's change are clipped to ± `limit`. More than the share `threshold` of a round's clients have to
    stay to its end, or it is abandoned. Once they have trained they have `stage_seconds` for each further message.
    """

    limit: Annotated[float, Field(gt=0, le=2**20)] = 1.0
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 2 / 3
    stage_seconds: Annotated[float, Field(gt=0)] = 300.0


class AggregationSettings(Record):
    """How updates become the next adapter; `docs/aggregation.md` says what each choice assumes.

    `weighting` says how much a client counts: by its tokens or examples, all alike, by how far its held-out loss fell,
    or by a function of your own, `module:function`, which gets the update's manifest and returns a weight.
    `carry_rank` bounds the rank of what `exact` carries on (None: four times the adapter's), `carry_energy` ends it
    earlier, where what is left is so small a share of the energy. `clip` bounds the norm of each client's change: a
    number, or `median`, that of the cohort. `byzantine` is how many of a cohort's clients may be hostile. The server's
    optimizer takes the aggregate's change for its gradient; `server_lr` None is 1, or 0.01 where it is adaptive.
    `scaffold` corrects the clients' steps for how their data differ (`scaffold.py`). `privacy` clips changes and adds
    noise (`privacy.py`).
    """

    aggregator: Literal[
        "exact", "svd", "fedavg", "ffa", "alternate", "median", "trimmed_mean", "krum", "multi_krum"
    ] = "exact"
    weighting: str = "tokens"
    carry_rank: Annotated[int, Field(ge=0, le=2**16)] | None = None
    carry_energy: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] | Literal["median"] | None = None
    byzantine: Annotated[int, Field(ge=1)] | None = None
    server_optimizer: Literal["none", "momentum", "adam", "yogi", "adagrad"] = "none"
    server_lr: Annotated[float, Field(gt=0)] | None = None
    server_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    server_eps: Annotated[float, Field(gt=0)] = 1e-3
    scaffold: bool = False
    privacy: PrivacySettings | None = None

    @property
    def fewest_updates(self) -> int:
        """How many updates the aggregator needs to stand `byzantine` hostile ones."""
        hostile = self.byzantine or 0
        return {"trimmed_mean": 2 * hostile + 1}.get(self.aggregator, 2 * hostile + 3) if hostile else 1

    def carried_rank(self, rank: int) -> int:
        """The largest rank of the carry beside an adapter of `rank`; 0 where the aggregator has none."""
        if self.aggregator == "svd" or self.aggregator in ON_FACTORS:
            return 0
        return 4 * rank if self.carry_rank is None else self.carry_rank

    @property
    def server_step(self) -> float:
        """The server's learning rate."""
        return self.server_lr or (0.01 if self.server_optimizer in ADAPTIVE else 1.0)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        name = self.aggregator
        if self.weighting not in WEIGHTINGS and not re.fullmatch(r"[\w.]+:\w+", self.weighting):
            raise ValueError(
                f"weighting {self.weighting!r} is not known; choose among {', '.join(WEIGHTINGS)}, or module:function"
            )
        if name in ROBUST and self.weighting != "equal":
            raise ValueError(
                f"{name} counts every client once, or a hostile one could claim more weight than all others; "
                "it needs weighting: equal"
            )
        if (self.byzantine is not None) != (name in ROBUST and name != "median"):
            raise ValueError(
                f"{name} needs byzantine, how many clients may be hostile"
                if self.byzantine is None
                else f"byzantine is for trimmed_mean, krum and multi_krum; {name} doesn't use it"
            )
        if (name == "svd" or name in ON_FACTORS) and (self.carry_rank or self.carry_energy):
            raise ValueError(f"{name} has no carry; use exact, or leave out carry_rank and carry_energy")
        if name == "fedavg" and self.clip is not None:
            raise ValueError(
                "clip bounds the change of products, which fedavg's averaged factors don't keep; use exact, ffa or "
                "alternate"
            )
        if self.server_optimizer in ADAPTIVE and name not in ON_FACTORS:
            raise ValueError(
                f"{self.server_optimizer} scales each coordinate by its history, but {name} takes factors from an SVD, "
                f"whose coordinates turn from round to round; use momentum, or one of {', '.join(ON_FACTORS)}"
            )
        if self.scaffold and name not in ("fedavg", "ffa"):
            raise ValueError(
                f"scaffold keeps mean gradients of factors, which {name} doesn't leave in place from round to round; "
                "use fedavg or ffa"
            )
        if self.scaffold and self.clip is not None:
            raise ValueError(
                "clip bounds the change of a client's adapter, not of its control variate, by which it would still "
                "move every other client's steps; leave out clip or scaffold"
            )
        if self.privacy:
            refuse(
                "privacy",
                [
                    (
                        name not in ("ffa", "fedavg"),
                        f"clips and adds noise to averaged factors, which {name} doesn't make; use ffa or fedavg",
                    ),
                    (
                        self.weighting != "equal",
                        "bounds what each client does, so all count alike; it needs weighting: equal",
                    ),
                    (self.clip is not None, "has a clip of its own; leave out the other one"),
                    (self.scaffold, "can't be used with scaffold, whose control variates have no noise"),
                ],
            )
        return self


class TierSettings(Record):
    """A smaller package and rank, for clients that have at least `memory` (`3GB`) but not enough for the tier above.

    Without `keep_layers` and `keep_neurons` the server plans the largest package and rank that fit.
    """

    memory: str
    keep_layers: str | int | float | list[int] | None = None
    keep_neurons: Annotated[float, Field(gt=0, le=1)] | None = None
    rank: Annotated[int, Field(ge=1, le=2**16)] | None = None


class FederationConfig(PackageSettings, SelectionSettings, AggregationSettings):
    """A whole federation, as `federation.yaml` gives it.

    `base_id` is what manifests and cards call the base model where `checkpoint` is a local copy of it; `package` is one
    that `shrink` made of this checkpoint, perhaps on a larger machine, to be taken instead of making one; `training`
    takes any argument of trl's `SFTConfig`; `proximal` is FedProx's μ; `client_eval_examples` is how many held-out
    examples a client evaluates at most, before and after training, 0 being none.
    `data` is what simulated clients are made of, and `clients` are real ones that may check in (None: whoever does),
    each with the most examples that it is believed to have. `eval_data` is public, and what the server evaluates on
    (None: what simulated clients hold out).
    `keys` is the list of keys that must have signed clients' updates (`keys.py`), or `auto`: the run makes keys for its
    simulated clients. `codec` is how updates are encoded, `topk_share` what share of the entries `topk` sends; `budget`
    is the most that the run may send, both ways together (`500MB`): a round that could overstep it is not begun.
    `server_optimizer` is momentum with `exact` if nothing else is said, which learned most (`docs/aggregation.md`).
    `secure` hides single updates from the server (`secagg.py`).
    """

    checkpoint: str
    revision: str | None = None
    base_id: str | None = None
    package: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    data: DataConfig | None = None
    clients: dict[ClientName, Annotated[int, Field(ge=1)]] | None = None
    eval_data: str | None = None
    lora: LoraSettings = LoraSettings()
    rounds: Annotated[int, Field(ge=1)] = 3
    codec: CodecName = "fp32"
    topk_share: TopkShare = 0.05
    budget: str | None = None
    keys: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    tiers: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")], TierSettings] = {}
    training: dict[str, Any] = {}
    proximal: Annotated[float, Field(ge=0)] = 0.0
    launcher: Literal["inprocess", "accelerate"] = "inprocess"
    eval_examples: Annotated[int, Field(ge=1)] | None = None
    client_eval_examples: Annotated[int, Field(ge=0)] = 64
    sample_prompt: str | None = None
    secure: SecureSettings | None = None

    @property
    def wire_codec(self) -> Codec:
        """How clients encode their updates."""
        return Codec(name=self.codec, topk_share=self.topk_share)

    @property
    def making(self) -> list[str]:
        """The keys that were given of those that say how packages are made."""
        return sorted(self.model_fields_set & {*PackageSettings.model_fields, "base_id", "tiers"})

    @model_validator(mode="before")
    @classmethod
    def _best_by_default(cls, given: Any) -> Any:
        best = isinstance(given, dict) and given.get("aggregator", "exact") == "exact"
        return {"server_optimizer": "momentum"} | given if best else given

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        check_federation(self)
        return self


def load_federation(path: Path) -> FederationConfig:
    """Read and check a federation file.

    Raises:
        ConfigError: missing, not YAML, or a value that is wrong; the message names the key.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; expected a federation in YAML.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # such as a date that there is not
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; expected keys such as checkpoint and data.")
    return checked(FederationConfig, raw, str(path))
