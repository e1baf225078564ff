"""What a run that is started again may have other than before."""

import pytest

from hf_fedlarge.artifacts import write_json
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.rerun import SETTINGS, begun_with

TRAINING = {"learning_rate": 1e-3, "max_length": 64}
PHONE = {"phone": {"memory": "1GB", "keep_layers": 2}}


def config(**changes):
    return FederationConfig.model_validate({"checkpoint": "x", "data": {"source": "x"}, "training": TRAINING} | changes)


@pytest.fixture
def begin(tmp_path):
    """Write down what the run is begun with."""

    def begin(**changes):
        write_json(tmp_path / SETTINGS, {"settings": config(**changes).model_dump(mode="json"), "revision": "r"})
        return tmp_path

    return begin


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-4, "max_steps": 5, "num_train_epochs": 1, "per_device_eval_batch_size": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "sgd", "max_length": 64},
        {"assistant_only_loss": False, "seed": 3},
    ],
)
def test_how_later_rounds_train_may_change(begin, changes):
    assert begun_with(begin(), config(training=TRAINING | changes)) == "r"
    assert begun_with(
        begin(scaffold=True, aggregator="ffa"), config(training={"max_length": 64}, scaffold=True, aggregator="ffa")
    )


@pytest.mark.parametrize(
    ("changes", "tiers", "found"),
    [
        ({"max_length": 128}, {}, "training.max_length"),
        ({"assistant_only_loss": True, "max_length": 65}, {}, "training.assistant_only_loss, training.max_length"),
        ({"per_device_train_batch_size": 2}, PHONE, "training.per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, PHONE, "training.gradient_accumulation_steps"),
    ],
)
def test_which_tokens_count_and_what_tiers_were_planned_for_may_not(begin, changes, tiers, found):
    with pytest.raises(ConfigError, match=f"with other settings for {found}; choose another --output"):
        begun_with(begin(tiers=tiers), config(tiers=tiers, training=TRAINING | changes))
    assert begun_with(begin(tiers=tiers), config(tiers=tiers)) == "r"


def test_losses_of_rounds_stay_comparable(begin):
    with pytest.raises(ConfigError, match="other settings for eval_examples"):
        begun_with(begin(), config(eval_examples=9))
