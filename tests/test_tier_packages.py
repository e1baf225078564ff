"""A run's packages: a large one takes hours, and somebody waits."""

import pytest
from families import make_checkpoint
from federation import make_federation

from hf_fedlarge.artifacts import PackageManifest, read_manifest
from hf_fedlarge.config import FederationConfig, TierSettings
from hf_fedlarge.progress import by_tenths
from hf_fedlarge.tier_packages import make_tier_package, make_tiers


@pytest.mark.parametrize(("layers", "expected"), [(3, [1, 2, 3]), (10, [*range(1, 11)]), (32, 10)])
def test_a_line_for_each_tenth_and_the_last_layer(layers, expected):
    lines = []
    told = by_tenths(lines.append, "fitting", layers)
    for done in range(1, layers + 1):
        told(done)
    assert lines[-1] == f"fitting: {layers} of {layers} layers are done"
    lines = [line.partition(",")[0] for line in lines]
    if isinstance(expected, int):
        assert len(lines) == expected
    else:
        assert lines == [f"fitting: {done} of {layers} layers are done" for done in expected]


@pytest.mark.parametrize(
    ("begun", "seconds", "left"),
    [(0, 2.0, "12 s"), (0, 60.0, "6 min"), (0, 3600.0, "6 h"), (0, 1000.0, "1 h 40 min"), (2, 60.0, "6 min")],
)
def test_the_time_left_is_told_by_the_layers_that_were_done_since_it_began(monkeypatch, begun, seconds, left):
    lines, clock = [], 500.0  # until the first layer is done libraries are loaded, and what was done before is read
    told = by_tenths(lines.append, "fitting", 10)
    monkeypatch.setattr("hf_fedlarge.progress.time.monotonic", lambda: clock)
    for done in range(begun + 1, 11):
        told(done)
        clock += seconds
    assert lines[0] == f"fitting: {begun + 1} of 10 layers are done"
    assert lines[3 - begun] == f"fitting: 4 of 10 layers are done, about {left} left"
    assert lines[-1] == "fitting: 10 of 10 layers are done"
    told(1)  # of another pass
    assert lines[-1] == "fitting: 1 of 10 layers are done"


def test_where_there_is_one_package_for_everybody_no_memory_is_too_small_to_be_asked(tmp_path, monkeypatch):
    checkpoint, _ = make_federation(tmp_path)
    config = FederationConfig(checkpoint=str(checkpoint), data={"source": "stdlib"})
    [tier] = make_tiers(checkpoint, config, tmp_path, None, print)
    assert tier.memory_bytes == 0
    monkeypatch.setattr("hf_fedlarge.tier_packages.make_tier_package", lambda *_: None)
    phones = config.model_copy(update={"tiers": {"phone": TierSettings(memory="400MB", keep_layers=2)}})
    sizes = [tier.memory_bytes for tier in make_tiers(checkpoint, phones, tmp_path, None, print)]
    assert sizes[0] > tier.manifest.total_bytes + 600 * 10**6
    assert sizes[1] == 400 * 10**6


def test_who_waits_for_a_package_is_told_what_is_done(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", layers=3, tokenizer=True)
    config = FederationConfig(
        checkpoint=str(checkpoint), data={"source": "stdlib"}, keep_neurons=0.5, base_id="me/model"
    )
    lines = []
    make_tier_package(checkpoint, config, config, tmp_path / "package", None, lines.append)
    assert read_manifest(tmp_path / "package", PackageManifest).base.id == "me/model"
    plan = next(line for line in lines if "keep 3 of 3 layers" in line)
    assert lines.index(plan) < lines.index("fitting: 1 of 3 layers are done")
    assert lines[-1] == "fitting: 3 of 3 layers are done"
