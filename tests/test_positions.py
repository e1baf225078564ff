"""A model's table of positions is found where longer sequences fail, and bounds what is evaluated and trained."""

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_config, make_model, make_package
from federation import LORA

from hf_fedlarge.adapters import attach_lora
from hf_fedlarge.architectures import describe
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.evaluation import evaluate
from hf_fedlarge.package import load_package
from hf_fedlarge.positions import check_length
from hf_fedlarge.tier_packages import check_packages
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer
from hf_fedlarge.transfer import transfer_report

TOO_LONG = "gpt2 model has positions for 512 tokens, but max_length is 1024; give a max_length of 512 or less"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_positions_for_so_many_tokens_or_for_any_number(family):
    positions, model = describe(make_config(family)).positions, make_model(family)
    with torch.no_grad():
        model(torch.full((1, 512), 9))
        if positions is None:
            model(torch.full((1, 513), 9))
            return
        assert positions == 512
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 513), 9))


def test_longer_examples_are_refused_before_anything_is_computed(tmp_path):
    package = make_package(tmp_path / "package", "gpt2")
    checkpoint, data = tmp_path / "package-full", [{"text": "short"}]
    with pytest.raises(ConfigError, match=TOO_LONG):
        evaluate(checkpoint, data)
    with pytest.raises(ConfigError, match=TOO_LONG):
        transfer_report(checkpoint, package, tmp_path / "no-adapter", data)
    model = load_package(package)
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match=TOO_LONG):
        StreamingLoraTrainer(attach_lora(model, model.architecture, LORA), config)


def test_a_federation_of_longer_examples_is_refused_before_anything_is_computed(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gpt2")
    settings = {"checkpoint": str(checkpoint), "data": {"source": "stdlib"}}
    with pytest.raises(ConfigError, match=TOO_LONG):
        check_packages(checkpoint, FederationConfig(**settings))
    check_packages(checkpoint, FederationConfig(**settings, training={"max_length": 512}))


def test_no_more_positions_than_there_are():
    for positions, max_length in ((512, 512), (None, None), (None, 2**20)):
        check_length("any", positions, max_length)
    for max_length in (513, None):
        with pytest.raises(ConfigError, match="512 or less"):
            check_length("any", 512, max_length)
