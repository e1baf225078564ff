"""Updates: what is accepted, what is refused and how it is named, and the adapter that comes of them."""

import json
import math
import re
import shutil

import pytest
import torch
from families import make_package
from federation import LORA, make_federation, make_update, plug_in
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_fedlarge.adapters import (
    ADAPTER_WEIGHTS,
    AdapterReader,
    attach_lora,
    get_factors,
    read_factors,
    read_state,
    set_factors,
)
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    MANIFEST_NAME,
    AdapterManifest,
    PackageManifest,
    file_entry,
    read_manifest,
)
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.errors import ArtifactError, ConfigError, OutputError, UpdateRefusedError
from hf_fedlarge.evaluation import load_model
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.merge import merge, plan_merge
from hf_fedlarge.package import load_package, package_architecture, package_config
from hf_fedlarge.tensors import read_header
from hf_fedlarge.update import MAX_NORM, Asked, Expected, update_bytes, validate_update
from hf_fedlarge.wire import ENCODED_WEIGHTS, EncodedReader, Wire


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


def rehash(directory, name=ADAPTER_WEIGHTS):
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    manifest["files"][name] = file_entry(directory / name).model_dump()
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
        (number_too_long_for_python, "The header of adapter_model.safetensors is not JSON"),
        (sizes_too_long_to_add, "size: Input should be less than or equal"),
        (unreadable, "fedlarge.json is not a regular file|has no fedlarge.json"),
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
        (lambda update: edit_manifest(update, surprise=1), "surprise is not known"),
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
    assert refused["dan"] == "dan refused: its update is in the name of cyd; expected dan, the client that was asked."
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


TOPK = Codec(name="topk", topk_share=0.1)


@pytest.fixture
def encoded(federation, tmp_path):
    """A maker of three good updates in a codec, from the adapter `start`."""
    _, package = federation
    start_adapter(package, tmp_path / "start", LORA, seed=3)

    def make(codec, **how):
        return {
            client: make_update(
                tmp_path / client, package, client, seed=seed, adapter=tmp_path / "start", codec=codec, **how
            )
            for seed, client in enumerate(("ann", "bob", "cyd"))
        }

    return make


def collect(federation, tmp_path, codec, **options):
    updates = [tmp_path / client for client in ("ann", "bob", "cyd")]
    start = tmp_path / "start"
    return aggregate_updates(updates, federation[1], tmp_path / "adapter", previous=start, codec=codec, **options)


@pytest.mark.parametrize(
    ("codec", "error"),
    [(Codec(name="bf16"), 0.003), (Codec(name="int8"), 0.01), (Codec(name="nf4"), 0.11), (TOPK, 0.9)],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_encoded_update_is_one_file_of_the_size_foretold_and_is_aggregated(
    federation, encoded, tmp_path, codec, error
):
    factors = encoded(codec)
    collected = collect(federation, tmp_path, codec, aggregator="fedavg")
    assert not collected.refused
    assert {path.name for path in (tmp_path / "ann").iterdir()} == {MANIFEST_NAME, ENCODED_WEIGHTS}
    architecture = describe(package_config(federation[1]))
    foretold = update_bytes(architecture, [0, 2, 3], LORA, codec)
    assert (tmp_path / "ann" / ENCODED_WEIGHTS).stat().st_size == foretold
    result, start = read_factors(tmp_path / "adapter"), read_factors(tmp_path / "start")
    for module, found in result.items():
        for index in range(2):
            mean = sum(factors[client][module][index] for client in factors) / 3
            assert torch.dist(found[index], mean) <= error * torch.dist(start[module][index], mean)


def test_an_update_in_fp32_has_the_size_foretold(federation, updates):
    foretold = update_bytes(describe(package_config(federation[1])), [0, 2, 3], LORA, Codec())
    assert (updates[0] / ADAPTER_WEIGHTS).stat().st_size == foretold


def test_a_frozen_factor_is_not_sent_and_arrives_bit_for_bit(federation, encoded, tmp_path):
    encoded(Codec(name="int8"), frozen="A")
    assert not collect(federation, tmp_path, Codec(name="int8"), aggregator="fedavg").refused
    small = read_manifest(federation[1], PackageManifest)
    architecture = describe(package_config(federation[1]))
    wire = Wire(Codec(name="int8"), AdapterReader(tmp_path / "start"), architecture, small.kept_layers, LORA)
    reader = EncodedReader(tmp_path / "ann" / ENCODED_WEIGHTS, wire)
    start = read_factors(tmp_path / "start")
    values = sum(start[module].B_OR.numel() for module in reader.modules)
    assert read_header(tmp_path / "ann" / ENCODED_WEIGHTS)["values"].shape == (values,)
    for module in reader.modules:
        assert torch.equal(reader.read(module).A_RI, start[module].A_RI)
        assert not torch.equal(reader.read(module).B_OR, start[module].B_OR)


def test_what_a_package_lacks_is_zero_in_the_parent_too(tmp_path):
    """A client's factors are zero at neurons that its package lacks, whatever the adapter that it started from has."""
    package = make_package(tmp_path / "package", "llama", keep_neurons=0.5)
    start_adapter(package, tmp_path / "start", LORA, seed=3)
    model = load_package(package)
    layers = model.package.kept_layers
    peft_model = attach_lora(model, model.architecture, LORA)
    set_factors(peft_model, read_factors(tmp_path / "start"), model.architecture, layers)
    untrained = get_factors(peft_model, model.architecture, layers)
    architecture = package_architecture(package, model.package)
    wire = Wire(INT8, AdapterReader(tmp_path / "start"), architecture, layers, LORA)
    assert (untrained["model.layers.3.mlp.down_proj"].A_RI == 0).any()
    for module in wire.shapes:
        assert all(map(torch.equal, untrained[module], wire.parent_factors(module)))
    make_update(tmp_path / "ann", package, "ann", adapter=tmp_path / "start", codec=INT8, frozen="AB")
    assert read_header(tmp_path / "ann" / ENCODED_WEIGHTS)["values"].shape == (0,)
    updates = {"previous": tmp_path / "start", "codec": INT8, "aggregator": "fedavg"}
    assert not aggregate_updates([tmp_path / "ann"], package, tmp_path / "next", **updates).refused
    start = read_factors(tmp_path / "start")
    for module, factors in read_factors(tmp_path / "next").items():
        assert all(map(torch.equal, start[module], factors))  # what wasn't changed is the parent's, all of it


INT8 = Codec(name="int8")


def edit_encoded(part, change):
    def spoil(update):
        tensors = load_file(update / ENCODED_WEIGHTS)
        tensors[part] = change(tensors[part].clone())
        save_file(tensors, update / ENCODED_WEIGHTS)
        rehash(update, ENCODED_WEIGHTS)

    return spoil


def put(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def add_to_encoded(update):
    tensors = load_file(update / ENCODED_WEIGHTS)
    save_file(tensors | {"../../etc/x": torch.zeros(1)}, update / ENCODED_WEIGHTS)
    rehash(update, ENCODED_WEIGHTS)


def grown(update):
    with (update / ENCODED_WEIGHTS).open("ab") as file:
        file.truncate(2**20)
    rehash(update, ENCODED_WEIGHTS)


def plain_beside(update):
    (update / ADAPTER_WEIGHTS).write_bytes(b"")
    rehash(update, ADAPTER_WEIGHTS)


@pytest.fixture(scope="module")
def sound(federation, tmp_path_factory):
    """Bob's good update in a codec, made once, and what is expected of it."""
    home, made = tmp_path_factory.mktemp("sound"), {}
    _, package = federation
    start_adapter(package, home / "start", LORA, seed=3)
    small, architecture = read_manifest(package, PackageManifest), describe(package_config(package))
    digest = read_manifest(home / "start", AdapterManifest).digest

    def make(codec):
        if codec not in made:
            make_update(home / codec.name, package, "bob", adapter=home / "start", codec=codec)
            wire = Wire(codec, AdapterReader(home / "start"), architecture, small.kept_layers, LORA)
            made[codec] = home / codec.name, Expected(small, architecture, LORA, 1, digest, wire=wire)
        return made[codec]

    return make


@pytest.mark.parametrize(
    ("codec", "spoil", "cause"),
    [
        (
            Codec(name="nf4"),
            edit_encoded("scales", put(0, torch.nan)),
            r"its A of model\.layers\.0\.\S+ is damaged: one of",
        ),
        (
            Codec(name="nf4"),
            edit_encoded("scales", put(-1, torch.inf)),
            r"its B of model\.layers\.3\.\S+ is damaged: one of its",
        ),
        (Codec(name="nf4"), edit_encoded("scales", put(0, 3e38)), "holds NaN|has the norm .* expected at most 1e"),
        (INT8, edit_encoded("scales", put(0, 255)), "has the norm .* expected at most 1e"),
        (INT8, edit_encoded("scales", lambda old: old[:-1]), "its tensor scales is torch.uint8 .* expected"),
        (INT8, edit_encoded("scales", torch.Tensor.double), "its tensor scales is torch.float64"),
        (INT8, edit_encoded("values", lambda old: old.view(1, -1)), r"its tensor values is torch.int8 \(1, "),
        (INT8, edit_encoded("values", lambda old: old[1:]), "its tensor values is torch.int8 .* expected"),
        (INT8, edit_encoded("changed", put(0, 2)), "its tensor changed holds 2; expected 0 or 1"),
        (INT8, edit_encoded("changed", put(0, 0)), "its tensor (scales|values) is .* for the factors that changed"),
        (INT8, edit_encoded("changed", lambda old: old[1:]), "its tensor changed is torch.uint8"),
        (INT8, edit_encoded("changed", lambda old: old.repeat(2)), "its tensor changed is torch.uint8"),
        (INT8, add_to_encoded, r"its tensor '../../etc/x' is not expected"),
        (INT8, grown, r"its files have 1048576 bytes; this adapter in int8 needs at most \d+"),
        (INT8, plain_beside, "only update.safetensors may be sent"),
        (
            INT8,
            lambda update: edit_manifest(update, codec=TOPK.model_dump()),
            "in topk of 0.1; .* takes int8",
        ),
        (
            INT8,
            lambda update: edit_manifest(update, codec=Codec().model_dump()),
            "in fp32; this round takes int8",
        ),
        (
            INT8,
            lambda update: edit_manifest(update, codec={"name": "zip", "topk_share": 1.0}),
            "codec.name: Input",
        ),
        (INT8, lambda update: edit_manifest(update, measured={"x" * 2**16: 1.0}), "fedlarge.json has .* at most 65536"),
        (Codec(name="bf16"), edit_encoded("values", put(7, torch.nan)), "its A of .* holds NaN or infinity"),
        (Codec(name="nf4"), edit_encoded("scales", put(3, -1.0)), "scales is negative"),
        (TOPK, edit_encoded("indices", put(0, -1)), "its A of .* is damaged: its indices are not rising"),
        (TOPK, edit_encoded("indices", put(1, 0)), "its indices are not rising"),
        (TOPK, edit_encoded("indices", put(-1, 2**31 - 1)), "its indices are not rising numbers from 0 to"),
        (TOPK, edit_encoded("indices", lambda old: old.flip(0)), "its indices are not rising"),
        (TOPK, edit_encoded("values", put(0, torch.inf)), "holds NaN or infinity"),
        (
            TOPK,
            lambda update: edit_manifest(update, codec={"name": "topk", "topk_share": 0.9}),
            "topk of 0.9; this",
        ),
    ],
)
def test_a_bad_encoded_update_is_refused_by_name(federation, sound, tmp_path, codec, spoil, cause):
    update, expected = sound(codec)
    shutil.copytree(update, tmp_path / "bob")
    validate_update(tmp_path / "bob", expected)
    spoil(tmp_path / "bob")
    with pytest.raises(UpdateRefusedError, match=cause) as refusal:
        validate_update(tmp_path / "bob", expected)
    assert str(refusal.value).startswith("bob refused: ")


def test_a_bad_encoded_update_does_not_keep_the_others_out(federation, encoded, tmp_path):
    encoded(INT8)
    edit_encoded("scales", put(0, 255))(tmp_path / "bob")
    collected = collect(federation, tmp_path, INT8)
    assert [entry.client for entry in collected.manifest.contributions] == ["ann", "cyd"]
    [(client, sentence)] = collected.refused
    assert client == "bob"
    assert sentence.startswith("bob refused: its A of ")


def test_a_round_takes_one_codec(federation, encoded, tmp_path):
    encoded(INT8)
    make_update(tmp_path / "dan", federation[1], "dan", adapter=tmp_path / "start")
    with pytest.raises(UpdateRefusedError, match=r"dan refused: it is encoded in fp32; this round takes int8"):
        aggregate_updates([tmp_path / "dan"], federation[1], tmp_path / "a", previous=tmp_path / "start", codec=INT8)
    with pytest.raises(UpdateRefusedError, match=r"ann refused: it is encoded in int8; this round takes fp32"):
        aggregate_updates([tmp_path / "ann"], federation[1], tmp_path / "a", previous=tmp_path / "start")
    with pytest.raises(ConfigError, match="The codec int8 needs --adapter"):
        aggregate_updates([tmp_path / "ann"], federation[1], tmp_path / "a", codec=INT8)


# --- the carry -------------------------------------------------------------------------------------------------------


def product(factors, scale=LORA.scale):
    return scale * factors.B_OR.double() @ factors.A_RI.double()


def test_the_carry_is_merged_and_evaluated_with_the_adapter_and_peft_loads_the_adapter_alone(
    federation, updates, tmp_path
):
    checkpoint, package = federation
    adapter = tmp_path / "adapter"
    manifest = aggregate_updates(updates, package, adapter).manifest
    assert manifest.carry_rank == 8
    lora, whole = read_state(adapter, manifest.lora)
    assert (lora.rank, lora.scale) == (12, LORA.scale)
    parts = [read_factors(update) for update in updates]
    for module, pair in whole.items():
        expected = sum(w * product(part[module]) for w, part in zip((0.1, 0.3, 0.6), parts, strict=True))
        torch.testing.assert_close(product(pair, lora.scale), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(pair.A_RI[:4], read_factors(adapter)[module].A_RI)

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    for module, pair in whole.items():
        plain.get_submodule(module).weight.data += product(pair, lora.scale).float()
    expected = plain(ids).logits
    merge(checkpoint, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    alone = plug_in(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), adapter)
    evaluated = load_model(checkpoint, adapter)  # in bf16
    missing = (alone(ids).logits - expected).norm()
    assert (merged(ids).logits - expected).norm() < 0.1 * missing  # stored in bf16
    assert (evaluated(ids).logits.float() - expected).norm() < 0.1 * missing


def test_clients_go_on_from_the_adapter_and_the_server_from_both(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "0", LORA, seed=3)
    for number in (1, 2, 3):
        before, output = tmp_path / str(number - 1), tmp_path / str(number)
        names = [tmp_path / f"{number}-{client}" for client in ("ann", "bob", "cyd")]
        sent = [
            make_update(name, package, name.name[2:], seed=10 * number + i, adapter=before, round_number=number)
            for i, name in enumerate(names)
        ]
        manifest = aggregate_updates(names, package, output, previous=before, carry_rank=99).manifest
        carried = {} if number == 1 else AdapterReader(before, CARRY_WEIGHTS)
        oracle = {
            module: sum(product(part[module]) for part in sent) / 3
            + (product(carried.read(module)) if module in carried else 0)
            for module in sent[0]
        }
        lora, whole = read_state(output, manifest.lora)
        assert manifest.energy_dropped == 0
        for module, expected in oracle.items():
            assert torch.dist(product(whole[module], lora.scale), expected) <= 1e-5 * expected.norm()


def test_a_carry_that_does_not_continue_the_adapter_is_not_merged(federation, updates, tmp_path):
    checkpoint, package = federation
    adapter = tmp_path / "adapter"
    aggregate_updates(updates, package, adapter)
    carry = load_file(adapter / CARRY_WEIGHTS)
    carry[first(carry)] = torch.zeros(3, 2)
    save_file(carry, adapter / CARRY_WEIGHTS)
    manifest = json.loads((adapter / MANIFEST_NAME).read_text())
    manifest["files"][CARRY_WEIGHTS] = file_entry(adapter / CARRY_WEIGHTS).model_dump()
    (adapter / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"of shape \(3, 2\), which doesn't continue the adapter's"):
        plan_merge(checkpoint, adapter)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("aggregator", "frozen"), [("ffa", "AA"), ("alternate", "AB")])
def test_a_frozen_factor_must_come_back_as_it_was(federation, tmp_path, aggregator, frozen):
    _, package = federation
    manifest = start_adapter(package, tmp_path / "0", LORA, seed=3, aggregator=aggregator)
    for number, letter in enumerate(frozen, start=1):
        assert manifest.trains == "BA"["AB".index(letter)]
        before = tmp_path / str(number - 1)
        for seed, client in enumerate(("ann", "bob", "cyd")):
            directory = tmp_path / f"{number}-{client}"
            make_update(directory, package, client, seed=seed + 5, adapter=before, round_number=number)
            if client != "bob":  # he trains both
                own = load_file(before / ADAPTER_WEIGHTS)
                keep = {name: tensor for name, tensor in own.items() if f"lora_{letter}" in name}
                edit_tensors(directory, lambda tensors, keep=keep: tensors.update(keep))
        updates = [tmp_path / f"{number}-{client}" for client in ("ann", "bob", "cyd")]
        collected = aggregate_updates(updates, package, tmp_path / str(number), previous=before, aggregator=aggregator)
        [(client, sentence)] = collected.refused
        assert client == "bob"
        assert re.search(f"its {letter} of .* is not its adapter's; this round freezes every {letter}", sentence)
        manifest = collected.manifest
        parts = [read_factors(tmp_path / f"{number}-{client}") for client in ("ann", "cyd")]
        for module, pair in read_factors(tmp_path / str(number)).items():
            expected = sum(product(part[module]) for part in parts) / 2
            assert torch.dist(product(pair), expected) <= 1e-6 * expected.norm()
    with pytest.raises(ConfigError, match=r"asked its clients to train \w; exact expects both in round"):
        aggregate_updates(updates, package, tmp_path / "next", previous=tmp_path / str(number))


def test_nan_is_refused_before_a_robust_aggregator_sees_it(federation, tmp_path):
    _, package = federation
    updates = [tmp_path / f"client{number}" for number in range(5)]
    for number, directory in enumerate(updates):
        make_update(directory, package, directory.name, seed=number)
    nan(updates[4])
    settings = {"aggregator": "trimmed_mean", "byzantine": 1, "weighting": "equal"}
    collected = aggregate_updates(updates, package, tmp_path / "adapter", **settings)
    assert [client for client, _ in collected.refused] == ["client4"]
    assert [entry.weight for entry in collected.manifest.contributions] == [0.25] * 4
    for factors in read_factors(tmp_path / "adapter").values():
        assert all(factor.isfinite().all() for factor in factors)
    with pytest.raises(UpdateRefusedError, match=r"4 of 5 updates are valid; at least 5 are needed for krum. client4"):
        aggregate_updates(updates, package, tmp_path / "krum", **settings | {"aggregator": "krum"})


def test_late_updates_are_taken_where_the_older_adapter_is_given(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "0", LORA, seed=3)
    make_update(tmp_path / "ann", package, "ann", seed=1, adapter=tmp_path / "0")
    late = make_update(tmp_path / "bob", package, "bob", seed=2, adapter=tmp_path / "0")
    aggregate_updates([tmp_path / "ann"], package, tmp_path / "1", previous=tmp_path / "0")
    fresh = make_update(tmp_path / "cyd", package, "cyd", seed=3, adapter=tmp_path / "1", round_number=2)
    both = [tmp_path / "bob", tmp_path / "cyd"]
    plain = aggregate_updates(both, package, tmp_path / "plain", previous=tmp_path / "1")
    assert [client for client, _ in plain.refused] == ["bob"]
    collected = aggregate_updates(both, package, tmp_path / "2", previous=tmp_path / "1", older=[tmp_path / "0"])
    assert not collected.refused
    assert [(entry.client, entry.staleness) for entry in collected.manifest.contributions] == [("bob", 1), ("cyd", 0)]
    weights = [entry.weight for entry in collected.manifest.contributions]
    assert weights == pytest.approx([0.5 * 2**-0.5, 0.5])
    lora, whole = read_state(tmp_path / "2", LORA)
    for module, pair in read_factors(tmp_path / "1").items():
        expected = weights[0] * product(late[module]) + weights[1] * product(fresh[module])
        expected = expected + (1 - weights[1]) * product(pair)  # bob started from nothing: B was zero
        assert torch.dist(product(whole[module], lora.scale), expected) <= 1e-5 * expected.norm()
    with pytest.raises(ConfigError, match="expected a round before 0"):
        aggregate_updates(both, package, tmp_path / "3", previous=tmp_path / "0", older=[tmp_path / "1"])
    with pytest.raises(ConfigError, match="alternate can't take late updates"):
        aggregate_updates(both, package, tmp_path / "3", older=[tmp_path / "0"], aggregator="alternate")
    with pytest.raises(ConfigError, match="Older adapters were given without the newest one"):
        aggregate_updates(both, package, tmp_path / "3", older=[tmp_path / "1"])


def by_rank_of_name(manifest):
    return {"ann": 1.0, "bob": 3.0, "cyd": 0.0}[manifest.client]


def not_a_weight(manifest):
    return None


def failing(manifest):
    raise KeyError(manifest.client)


def test_weights_can_be_alike_or_a_function_s_or_what_the_client_gained(federation, updates, tmp_path):
    def weights(name, **choices):
        collected = aggregate_updates(updates, federation[1], tmp_path / name, **choices)
        return {entry.client: entry.weight for entry in collected.manifest.contributions}, collected.refused

    assert weights("equal", weighting="equal") == ({"ann": 1 / 3, "bob": 1 / 3, "cyd": 1 / 3}, ())
    assert weights("own", weighting="test_collect:by_rank_of_name") == ({"ann": 0.25, "bob": 0.75, "cyd": 0.0}, ())
    edit_manifest(updates[0], loss_before=3.0, loss_after=2.5)
    edit_manifest(updates[1], loss_before=3.0, loss_after=3.5)
    found, refused = weights("loss", weighting="loss")
    assert found == {"ann": 1.0, "bob": 0.0}
    assert "cyd refused: it has no held-out loss, which the weighting loss needs" in refused[0][1]
    with pytest.raises(ConfigError, match="test_collect:not_a_weight gave None for ann; expected 0 or more"):
        weights("none", weighting="test_collect:not_a_weight")
    with pytest.raises(ConfigError, match="test_collect:failing failed for ann with KeyError: 'ann'"):
        weights("none", weighting="test_collect:failing")
    with pytest.raises(ConfigError, match=r"nowhere:weigh can't be imported: .*; PYTHONPATH has to have the directory"):
        weights("none", weighting="nowhere:weigh")
    edit_manifest(updates[0], loss_before=3.0, loss_after=3.5)
    assert weights("nobody", weighting="loss")[0] == {"ann": 0.5, "bob": 0.5}


WEIGHT_OF = {}


def weight_of(manifest):
    return WEIGHT_OF.get(manifest.client, 1)


@pytest.mark.parametrize("weight", [-1, -1e-300, math.nan, math.inf, "1", None, 0, 1e30, 5e-324])
def test_a_weight_that_is_none_stops_and_no_other_spoils_anything(federation, updates, tmp_path, monkeypatch, weight):
    monkeypatch.setitem(WEIGHT_OF, "bob", weight)

    def collect(output):
        how = {"weighting": "test_collect:weight_of"}
        return aggregate_updates(updates, federation[1], tmp_path / output, **how).manifest

    if weight in (0, 1e30, 5e-324):
        found = {entry.client: entry.weight for entry in collect("made").contributions}
        assert sum(found.values()) == pytest.approx(1)
        assert found["bob"] == pytest.approx(weight / (weight + 2))
        reader = AdapterReader(tmp_path / "made")
        assert all(factor.isfinite().all() for module in reader.modules for factor in reader.read(module))
    else:
        with pytest.raises(ConfigError, match=r"weight_of gave .* for bob; expected 0 or more"):
            collect("none")
        assert not (tmp_path / "none").exists()


def test_what_the_server_keeps_must_be_gone_on_with(federation, tmp_path):
    _, package = federation
    start_adapter(package, tmp_path / "0", LORA, seed=3)
    both = [tmp_path / "ann", tmp_path / "bob"]
    for seed, directory in enumerate(both):
        make_update(directory, package, directory.name, seed=seed, adapter=tmp_path / "0")
    aggregate_updates(both, package, tmp_path / "1", previous=tmp_path / "0")
    make_update(tmp_path / "cyd", package, "cyd", adapter=tmp_path / "1", round_number=2)
    with pytest.raises(ConfigError, match="has a carry, which fedavg would lose; go on with exact"):
        aggregate_updates([tmp_path / "cyd"], package, tmp_path / "2", previous=tmp_path / "1", aggregator="fedavg")
    how = {"aggregator": "fedavg", "previous": tmp_path / "0"}
    adam = aggregate_updates(both, package, tmp_path / "adam", server_optimizer="adam", **how).manifest
    assert adam.server_optimizer == "adam"
    assert {"server_momentum.safetensors", "server_variance.safetensors"} < set(adam.files)
    make_update(tmp_path / "eve", package, "eve", adapter=tmp_path / "adam", round_number=2)
    how["previous"] = tmp_path / "adam"
    with pytest.raises(ConfigError, match="has averages of adam, which yogi can't go on with"):
        aggregate_updates([tmp_path / "eve"], package, tmp_path / "2", server_optimizer="yogi", **how)
    aggregate_updates([tmp_path / "eve"], package, tmp_path / "2", server_optimizer="adam", **how)
