"""What a client's memory is enough for."""

import pytest
from families import make_checkpoint

from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.tiers import describe_fit, fit_memory

LORA = LoraSettings(rank=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiers") / "checkpoint", layers=6)


def fit(checkpoint, memory, tokens=512, lora=LORA):
    return fit_memory(checkpoint, memory, tokens, lora, "int8")


def test_more_memory_never_fits_less_and_what_fits_is_within_it(checkpoint):
    most = fit(checkpoint, 10**12)
    assert (most.keep_layers, most.keep_neurons, most.rank) == (1, 1, 32)
    seen = [most]
    while len(seen) < 8:
        found, last = fit(checkpoint, seen[-1].needed_bytes - 1), seen[-1]
        assert found.needed_bytes < last.needed_bytes
        assert (found.keep_layers, found.keep_neurons, found.rank) < (last.keep_layers, last.keep_neurons, last.rank)
        seen.append(found)
    assert seen[-1].rank == 4
    assert len(seen[-1].plan.kept) == 3
    with pytest.raises(ConfigError, match="the smallest package needs"):
        fit(checkpoint, seen[-1].needed_bytes - 1)


def test_more_tokens_need_more(checkpoint):
    assert fit(checkpoint, 10**12, tokens=4096).needed_bytes > fit(checkpoint, 10**12).needed_bytes


def test_the_rank_asked_for_is_the_most_and_may_be_below_the_least(checkpoint):
    assert fit(checkpoint, 10**12, lora=LoraSettings(rank=2)).rank == 2


def test_layers_go_where_neurons_cannot(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "phi3", layers=6)
    most = fit(checkpoint, 10**12)
    fits = fit(checkpoint, most.needed_bytes - most.plan.package_bytes // 4, lora=LoraSettings(rank=4))
    assert fits.keep_neurons == 1


def test_the_line_that_the_server_prints(checkpoint):
    line = describe_fit(fit(checkpoint, 3 * 10**9), 3 * 10**9, 512)
    assert line.startswith("fits in 3.0 GB at 512 tokens: keep 6 of 6 layers, r=32: ")
