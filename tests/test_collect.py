"""Updates: what is accepted, what is refused and how it is named, and the adapter that comes of them."""

import json
import re

import pytest
import torch
from federation import LORA, make_federation, make_update
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_fedlarge.adapters import ADAPTER_WEIGHTS, plug_in, read_factors
from hf_fedlarge.artifacts import MANIFEST_NAME, AdapterManifest, file_entry, read_manifest
from hf_fedlarge.collect import aggregate_updates, start_adapter
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ArtifactError, ConfigError, OutputError, UpdateRefusedError
from hf_fedlarge.update import MAX_NORM, Asked


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def updates(federation, tmp_path):
    """Three good updates: ann with 100 tokens, bob with 300, cyd with 600."""
    _, package = federation
    for seed, (client, tokens) in enumerate((("ann", 100), ("bob", 300), ("cyd", 600))):
        make_update(tmp_path / client, package, client, seed=seed, tokens=tokens, examples=10 * (seed + 1))
    return [tmp_path / client for client in ("ann", "bob", "cyd")]


def edit_manifest(directory, **changes):
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    """Change an update's tensors and make its manifest agree, as a hostile client would."""
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    rehash(directory)


def rehash(directory):
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    manifest["files"][ADAPTER_WEIGHTS] = file_entry(directory / ADAPTER_WEIGHTS).model_dump()
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def write_header(directory, header, data=b""):
    (directory / ADAPTER_WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
    rehash(directory)


def first(tensors):
    return sorted(tensors)[0]


@pytest.mark.parametrize("aggregator", ["exact", "svd", "fedavg"])
def test_the_adapter_is_the_weighted_aggregate_and_loads_on_the_full_model(federation, updates, tmp_path, aggregator):
    checkpoint, package = federation
    collected = aggregate_updates(updates, package, tmp_path / "adapter", aggregator=aggregator)
    assert collected.refused == ()
    assert [entry.weight for entry in collected.manifest.contributions] == pytest.approx([0.1, 0.3, 0.6])
    assert collected.manifest.layers == [0, 2, 3]
    parts, result = [read_factors(update) for update in updates], read_factors(tmp_path / "adapter")
    for module, (A_RI, B_OR) in result.items():
        if aggregator == "fedavg":
            expected = sum(w * part[module].B_OR for w, part in zip((0.1, 0.3, 0.6), parts, strict=True))
            torch.testing.assert_close(B_OR, expected)
        else:
            dense = sum(
                w * part[module].B_OR.double() @ part[module].A_RI.double()
                for w, part in zip((0.1, 0.3, 0.6), parts, strict=True)
            )
            U, S, Vh = torch.linalg.svd(dense)
            best = U[:, :4] * S[:4] @ Vh[:4]
            torch.testing.assert_close(B_OR.double() @ A_RI.double(), best, rtol=1e-4, atol=1e-5)
    manifest = collected.manifest
    if aggregator == "svd":
        assert 0 < manifest.energy_dropped < 1
        assert manifest.carry_rank == manifest.energy_carried == 0
    if aggregator == "exact":
        assert 0 < manifest.energy_carried < 1
        assert manifest.energy_dropped == 0
        assert manifest.carry_rank == 2 * LORA.rank  # what three clients' ranks leave
    assert ("carry.safetensors" in manifest.files) == (aggregator == "exact")

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    before = model(ids).logits.detach()
    plugged = plug_in(model, tmp_path / "adapter")
    assert not torch.allclose(before, plugged(ids).logits)
    assert {name.split(".layers.")[1].split(".")[0] for name, _ in plugged.named_parameters() if "lora_A" in name} == {
        "0",
        "2",
        "3",
    }


def test_examples_can_weigh(federation, updates, tmp_path):
    collected = aggregate_updates(updates, federation[1], tmp_path / "adapter", weighting="examples")
    assert [entry.weight for entry in collected.manifest.contributions] == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_the_order_of_arrival_does_not_show_in_the_bytes(federation, updates, tmp_path):
    one = aggregate_updates(updates, federation[1], tmp_path / "one")
    two = aggregate_updates(updates[::-1], federation[1], tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest


def test_a_round_follows_the_adapter_before_it(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "start", LORA, seed=3)
    make_update(tmp_path / "ann", package, "ann", adapter=tmp_path / "start")
    make_update(tmp_path / "bob", package, "bob")
    collected = aggregate_updates(
        [tmp_path / "ann", tmp_path / "bob"], package, tmp_path / "adapter", previous=tmp_path / "start", round_number=1
    )
    assert [entry.client for entry in collected.manifest.contributions] == ["ann"]
    assert "bob refused: it started from the adapter none" in collected.refused[0][1]
    assert collected.manifest.parent == read_manifest(tmp_path / "start", AdapterManifest).digest


def test_the_starting_adapter_changes_nothing_and_is_the_same_everywhere(federation, tmp_path):
    checkpoint, package = federation
    one = start_adapter(package, tmp_path / "one", LORA, seed=3)
    assert one.digest == start_adapter(package, tmp_path / "two", LORA, seed=3).digest
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    before = model(ids).logits.detach()
    torch.testing.assert_close(plug_in(model, tmp_path / "one")(ids).logits, before, rtol=0, atol=0)


def nan(update):
    edit_tensors(update, lambda tensors: tensors[first(tensors)].view(-1)[3].fill_(torch.nan))


def infinity(update):
    edit_tensors(update, lambda tensors: tensors[first(tensors)].view(-1)[3].fill_(-torch.inf))


def wrong_shape(update):
    edit_tensors(update, lambda tensors: tensors.update({first(tensors): torch.zeros(1)}))


def half(update):
    edit_tensors(update, lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].half()}))


def missing_tensor(update):
    edit_tensors(update, lambda tensors: tensors.pop(first(tensors)))


def extra_tensor(update):
    edit_tensors(update, lambda tensors: tensors.update({"../../etc/x": torch.zeros(1)}))


def dropped_layer(update):
    def move(tensors):
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".layers.0.", ".layers.1.")] = tensors.pop(name)

    edit_tensors(update, move)


def flipped_bit(update):
    data = bytearray((update / ADAPTER_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (update / ADAPTER_WEIGHTS).write_bytes(data)


def truncated(update):
    data = (update / ADAPTER_WEIGHTS).read_bytes()
    (update / ADAPTER_WEIGHTS).write_bytes(data[:-100])


def truncated_and_rehashed(update):
    truncated(update)
    rehash(update)


def pickle(update):
    (update / ADAPTER_WEIGHTS).write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.")
    rehash(update)


def huge_header(update):
    (update / ADAPTER_WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    rehash(update)


def repeated_key(update):
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    write_header(update, header, b"\0" * 4)


def number_too_long_for_python(update):
    write_header(update, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}')


def sizes_too_long_to_add(update):
    files = json.loads((update / MANIFEST_NAME).read_text())["files"]
    edit_manifest(update, files={name: entry | {"size": 10**4300 - 1} for name, entry in files.items()})


def unreadable(update):
    (update / MANIFEST_NAME).unlink()
    (update / MANIFEST_NAME).symlink_to("/proc/self/mem")  # a regular file that nobody can read from its start


def too_large(update):
    edit_tensors(update, lambda tensors: tensors[first(tensors)].fill_(3e38))


def other_lora(**changes):
    return lambda update: edit_manifest(update, lora=LORA.model_dump() | changes)


def code(update):
    (update / "modeling.py").write_text("raise SystemExit")


def listed_code(update):
    code(update)
    manifest = json.loads((update / MANIFEST_NAME).read_text())
    manifest["files"]["modeling.py"] = file_entry(update / "modeling.py").model_dump()
    (update / MANIFEST_NAME).write_text(json.dumps(manifest))


def symlink(update):
    (update / ADAPTER_WEIGHTS).rename(update.parent / "elsewhere")
    (update / ADAPTER_WEIGHTS).symlink_to(update.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (nan, "NaN or infinity"),
        (infinity, "NaN or infinity"),
        (wrong_shape, r"is torch.float32 \(1,\); expected"),
        (half, "is torch.float16"),
        (missing_tensor, "is missing"),
        (extra_tensor, r"'../../etc/x' is not expected"),
        (dropped_layer, "is (missing|not expected)"),
        (flipped_bit, "has the digest"),
        (truncated, "its manifest says"),
        (truncated_and_rehashed, "not a readable safetensors file"),
        (pickle, "announces a header of"),
        (huge_header, "announces a header of"),
        (repeated_key, "holds a key twice"),
        (number_too_long_for_python, "header that can't be read as JSON"),
        (sizes_too_long_to_add, "size: Input should be less than or equal"),
        (unreadable, "can't be read|has no fedlarge.json"),
        (too_large, r"its A of model\.layers\.0\.\S+ has the norm \S+e\+39; expected at most 1e\+06"),
        (other_lora(targets=["nope"]), "bob refused: The LoRA target 'nope' is no matrix"),
        (other_lora(targets=[]), "targets"),
        (other_lora(rank=2**40), "rank: Input should be less than or equal"),
        (other_lora(rank=1), "its LoRA settings are .*rank=1 .*; expected .*rank=4"),
        (code, r"holds modeling.py, which its manifest does not list"),
        (listed_code, "only adapter_config.json and adapter_model.safetensors may be sent"),
        (symlink, "is not a regular file"),
        (lambda update: edit_manifest(update, round=7), "it is for round 7; expected round 1"),
        (lambda update: edit_manifest(update, package="0" * 64), "it was trained on the package 000000000000"),
        (lambda update: edit_manifest(update, adapter="0" * 64), "it started from the adapter 000000000000"),
        (lambda update: edit_manifest(update, tokens=0), "it claims 20 examples and 0 tokens"),
        (lambda update: edit_manifest(update, tokens=-1), "tokens: Input should be greater than or equal to 0"),
        (lambda update: edit_manifest(update, tokens=10**30), "tokens"),
        (lambda update: edit_manifest(update, tokens=float("nan")), "tokens"),
        (lambda update: edit_manifest(update, examples=0), "it claims 0 examples"),
        (lambda update: edit_manifest(update, client="../../x"), "client: String should match pattern"),
        (lambda update: edit_manifest(update, client="ann"), "ann refused: it sent more than one update"),
        (lambda update: edit_manifest(update, kind="package"), "is of kind 'package'; expected an update"),
        (lambda update: edit_manifest(update, surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda update: (update / MANIFEST_NAME).unlink(), "has no fedlarge.json"),
        (lambda update: (update / MANIFEST_NAME).write_text("{"), "is not JSON"),
    ],
)
def test_a_bad_update_is_refused_by_name_and_the_others_count(federation, updates, tmp_path, spoil, cause):
    spoil(updates[1])
    collected = aggregate_updates(updates, federation[1], tmp_path / "adapter", round_number=1)
    assert [entry.client for entry in collected.manifest.contributions] == ["ann", "cyd"]
    assert [entry.weight for entry in collected.manifest.contributions] == pytest.approx([1 / 7, 6 / 7])
    [(_, sentence)] = collected.refused
    assert "refused: " in sentence
    assert re.search(cause, sentence), sentence


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (other_lora(targets=["nope"]), "The LoRA target 'nope' is no matrix"),
        (other_lora(rank=1), "its LoRA settings are"),
        (lambda update: edit_manifest(update, round=7), "it is for round 7; expected round 1"),
        (lambda update: edit_manifest(update, package="0" * 64), "it was trained on the package"),
        (lambda update: edit_manifest(update, adapter="0" * 64), "it started from the adapter"),
        (unreadable, "refused"),
    ],
)
@pytest.mark.parametrize("bad", [0, 2])
def test_without_a_previous_adapter_most_decide_not_the_first(federation, updates, tmp_path, spoil, cause, bad):
    spoil(updates[bad])
    collected = aggregate_updates(updates, federation[1], tmp_path / "adapter")
    assert collected.manifest.lora == LORA
    assert collected.manifest.round == 1
    assert len(collected.manifest.contributions) == 2
    [(client, sentence)] = collected.refused
    assert client == updates[bad].name
    assert cause in sentence


def test_a_client_has_one_vote_and_settings_that_no_model_has_none(federation, updates, tmp_path):
    _, package = federation
    copies = [tmp_path / f"copy{number}" for number in range(4)]
    for copy in copies:
        make_update(copy, package, "dan", lora=LoraSettings(rank=2))
    nobody = [tmp_path / f"nobody{number}" for number in range(4)]
    for directory in nobody:
        make_update(directory, package, directory.name)
        other_lora(targets=["nope"])(directory)
    collected = aggregate_updates([*copies, *nobody, *updates], package, tmp_path / "adapter")
    assert [entry.client for entry in collected.manifest.contributions] == ["ann", "bob", "cyd"]
    with pytest.raises(UpdateRefusedError, match="The LoRA target 'nope' is no matrix"):
        aggregate_updates(nobody, package, tmp_path / "none")


def test_a_tie_does_not_depend_on_the_order(federation, updates, tmp_path):
    make_update(tmp_path / "dan", federation[1], "dan", lora=LoraSettings(rank=2))
    pair = [updates[0], tmp_path / "dan"]
    one = aggregate_updates(pair, federation[1], tmp_path / "one")
    two = aggregate_updates(pair[::-1], federation[1], tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest
    assert one.refused == two.refused


def test_the_round_is_the_one_after_the_previous_adapter(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "start", LORA, seed=3)
    for number, client in ((2, "ann"), (1, "bob")):
        make_update(tmp_path / client, package, client, adapter=tmp_path / "start", round_number=number)
    collected = aggregate_updates(
        [tmp_path / "ann", tmp_path / "bob"], package, tmp_path / "adapter", previous=tmp_path / "start"
    )
    assert collected.manifest.round == 1
    assert collected.refused == (("ann", "ann refused: it is for round 2; expected round 1."),)


def test_the_largest_norm_allowed_gives_a_finite_adapter(federation, updates, tmp_path):
    def grow(tensors):
        for tensor in tensors.values():
            tensor.mul_(0.999 * MAX_NORM / tensor.norm())

    for update in updates:
        edit_tensors(update, grow)
    assert not aggregate_updates(updates, federation[1], tmp_path / "adapter").refused
    for factors in read_factors(tmp_path / "adapter").values():
        assert all(factor.isfinite().all() for factor in factors)


def test_an_update_is_held_to_what_its_client_was_asked_for(federation, updates, tmp_path):
    asked = {
        updates[0]: Asked("ann", 10, 100),
        updates[1]: Asked("bob", 20, 299),
        updates[2]: Asked("cyd", 29, 600),
    }
    impostor, broken = tmp_path / "dan", tmp_path / "eve"
    make_update(impostor, federation[1], "cyd")
    make_update(broken, federation[1], "zoe")
    unreadable(broken)
    asked |= {impostor: Asked("dan", 10, 100), broken: Asked("eve", 10, 100)}
    collected = aggregate_updates([impostor, broken, *updates], federation[1], tmp_path / "adapter", asked=asked)
    assert [entry.client for entry in collected.manifest.contributions] == ["ann"]
    refused = dict(collected.refused)
    assert list(refused) == ["dan", "eve", "bob", "cyd"]
    assert refused["dan"] == "dan refused: its update is signed cyd; expected dan, the client that was asked."
    assert refused["eve"].startswith("eve refused: ")
    assert refused["bob"] == "bob refused: it claims 20 examples and 300 tokens; expected 1 to 20 and 1 to 299."
    assert refused["cyd"] == "cyd refused: it claims 30 examples and 600 tokens; expected 1 to 29 and 1 to 600."


def test_other_lora_settings_are_refused(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "start", LORA, seed=0)
    other = LoraSettings(rank=4, alpha=8000.0)
    make_update(tmp_path / "ann", package, "ann", adapter=tmp_path / "start", lora=other)
    with pytest.raises(UpdateRefusedError, match=r"its LoRA settings are .*8000"):
        aggregate_updates([tmp_path / "ann"], package, tmp_path / "adapter", previous=tmp_path / "start")
    assert not (tmp_path / "adapter").exists()


def test_a_round_without_enough_valid_updates_makes_nothing(federation, updates, tmp_path):
    nan(updates[0])
    flipped_bit(updates[1])
    with pytest.raises(UpdateRefusedError, match=r"1 of 3 updates are valid; at least 2 .* ann refused: .*bob"):
        aggregate_updates(updates, federation[1], tmp_path / "adapter", min_updates=2)
    assert {path.name for path in tmp_path.iterdir()} == {"ann", "bob", "cyd"}


def test_adapter_config_is_never_parsed(federation, updates, tmp_path):
    config = updates[0] / "adapter_config.json"
    config.write_text('{"auto_map": "evil", "peft_type": ')
    manifest = json.loads((updates[0] / MANIFEST_NAME).read_text())
    manifest["files"]["adapter_config.json"] = file_entry(config).model_dump()
    (updates[0] / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert not aggregate_updates(updates, federation[1], tmp_path / "adapter").refused


def test_bad_arguments_are_refused_before_anything_is_read(federation, updates, tmp_path):
    _, package = federation
    with pytest.raises(ConfigError, match=r"aggregator: Input should be 'exact', .* or 'multi_krum'"):
        aggregate_updates(updates, package, tmp_path / "a", aggregator="mean")
    with pytest.raises(ConfigError, match="weighting 'love' is not known; choose among tokens"):
        aggregate_updates(updates, package, tmp_path / "a", weighting="love")
    with pytest.raises(ConfigError, match="No update was given"):
        aggregate_updates([], package, tmp_path / "a")
    with pytest.raises(ArtifactError, match="expected a package"):
        aggregate_updates(updates, updates[0], tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        aggregate_updates(updates, package, updates[0])
    assert not (tmp_path / "a").exists()
