"""A package is the kept layers in the order of its map; stock transformers reads it right or not at all."""

import errno
import json
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from families import FAMILIES, make_checkpoint, make_config, make_package
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_fedlarge import shrink as shrink_module
from hf_fedlarge.architectures import describe, load_config
from hf_fedlarge.artifacts import PackageManifest, read_manifest, verify_files
from hf_fedlarge.errors import ArtifactError, ConfigError, OutputError
from hf_fedlarge.layers import parse_layers
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.shrink import choose_layers, plan_shrink, shrink
from hf_fedlarge.tensors import INDEX_NAME, SafetensorsWriter, checkpoint_digest

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """family → its package with bf16 embeddings, made once; the checkpoint is beside it, as `-full`."""
    root = tmp_path_factory.mktemp("packages")
    return cache(lambda family: make_package(root / family, family, embeddings="bf16"))


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "full", "llama", layers=4, tokenizer=True)


def full_of(package):
    return package.with_name(f"{package.name}-full")


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def distance(found, truth):
    return ((found.float() - truth.float()).norm() / truth.float().norm()).item()


def sentence(call, *arguments, error, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# Which layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20", 20),
        (20, 20),
        ("1", 1),
        ("30", 30),
        (0.75, 22),
        ("0.5", 15),
        ("1.0", 30),
        (1.0, 30),
        ("0-9,12,28-29", [*range(10), 12, 28, 29]),
        (" 3, 1 ", [1, 3]),
        ([5, 0], [0, 5]),
    ],
)
def test_layers_are_given_as_a_count_a_fraction_or_a_list(text, expected):
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("0", 0, "31", "-1", -1, "0.0", 0.0, "0.01", "1.5", 1e-9, float("nan"), float("inf")),
        *("", ",", "a", "0-", "-3", "0..3", "1,2,2", "0-3,2", "29-30", "0,30", "5-2", "0-3,9-5", "1;2"),
        *("0-99999999999999", "99999999999-99999999999999", [], [30], [-1], [1, 1]),
    ],
)
def test_layers_that_make_no_sense_are_refused_with_what_is_expected(text):
    message = sentence(parse_layers, text, 30, error=ConfigError)
    assert "--keep-layers" in message
    assert "expected a count from 1 to 30, a fraction above 0 and up to 1, or a list such as 0-9,12" in message


@given(st.integers(1, 100).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_the_layers_chosen_are_that_many_and_spare_the_ends_while_possible(numbers):
    total, count = numbers
    chosen = choose_layers(total, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    assert set(chosen) <= set(range(total))
    if count >= min(total, 3):
        assert {0, min(1, total - 1), total - 1} <= set(chosen)
        gaps = [later - earlier for earlier, later in pairwise(sorted(set(range(total)) - set(chosen)))]
        assert not gaps or max(gaps) - min(gaps) <= 1


# The plan


def test_a_plan_says_everything_and_writes_nothing(checkpoint):
    before = sorted(checkpoint.parent.rglob("*"))
    plan = plan_shrink(checkpoint, keep_layers=0.75)
    assert sorted(checkpoint.parent.rglob("*")) == before
    assert (plan.layers, plan.kept, plan.dropped) == (4, (0, 1, 3), (2,))
    text = plan.describe()
    for words in ("keep 3 of 4 layers", "kept     0-1, 3", "dropped  2", "21 nf4", "2 int8", "MB → "):
        assert words in text
    assert "dropped  none" in plan_shrink(checkpoint, keep_layers=4).describe()


@pytest.mark.parametrize("embeddings", ["int8", "nf4", "bf16"])
def test_a_plan_knows_the_size_of_what_shrinking_writes(checkpoint, embeddings):
    plan = plan_shrink(checkpoint, embeddings=embeddings)
    progress = []
    shrink(plan, checkpoint.with_name("package"), progress=progress.append)
    written = load_file(checkpoint.with_name("package") / "model.safetensors")
    assert plan.package_bytes == sum(tensor.nbytes for tensor in written.values()) == progress[-1]
    assert plan.full_bytes == sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())


def test_all_neurons_stay_where_they_are_no_multiple_of_64(tmp_path):
    config = make_config("llama")
    config.intermediate_size = 200
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "full")
    assert plan_shrink(tmp_path / "full", keep_layers=1.0, keep_neurons=1.0).widths == {}
    assert plan_shrink(tmp_path / "full", keep_layers=1.0, keep_neurons=0.99).widths == {0: 192, 1: 192}


def test_embeddings_of_an_unknown_kind_are_refused(checkpoint):
    assert "int8, nf4 or bf16" in sentence(plan_shrink, checkpoint, embeddings="int4", error=ConfigError)


@pytest.mark.parametrize("tensor", [torch.zeros(7, 64), torch.zeros(300, 64, dtype=torch.int8), torch.zeros(64)])
def test_a_tensor_that_is_not_what_the_config_says_is_refused_before_anything_is_written(checkpoint, tensor):
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"model.embed_tokens.weight": tensor}, checkpoint / "model.safetensors")
    message = sentence(plan_shrink, checkpoint, error=ArtifactError)
    assert "model.embed_tokens.weight" in message
    assert "(300, 64)" in message


# The package


@every_family
def test_each_block_is_the_layer_its_map_says(package, family):
    directory = package(family)
    manifest = read_manifest(directory, PackageManifest)
    verify_files(directory, manifest)
    assert manifest.kept_layers == [0, 2, 3]
    assert [(entry.layer, entry.block) for entry in manifest.layers] == [(0, 0), (1, None), (2, 1), (3, 2)]
    assert manifest.base.digest == checkpoint_digest(full_of(directory))
    found, full = describe(load_config(full_of(directory))), AutoModelForCausalLM.from_pretrained(full_of(directory))
    parameters, stored = dict(full.named_parameters()), load_file(directory / "model.safetensors")
    small = {name for name in manifest.codecs if manifest.codecs[name] == "nf4"}
    assert small == {name for block in range(3) for name in found.linear_weights(block)}
    for name, tensor in stored.items():
        block = found.layer_of(name)
        source = parameters.get(name if block is None else found.in_layer(name, [0, 2, 3][block]))
        if source is None:
            assert name.rpartition(".")[0] in small or "quant_state" in name
            continue
        source = source.detach().T.contiguous() if found.is_transposed(name) else source.detach()
        assert torch.equal(tensor, bnb.quantize_4bit(source, quant_type="nf4")[0] if name in small else source)


@every_family
def test_a_tied_head_is_stored_once(package, family):
    directory = package(family)
    manifest, tied = read_manifest(directory, PackageManifest), describe(load_config(full_of(directory))).tied
    stored = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in stored) == ("lm_head.weight" in manifest.codecs) == (not tied)


def test_the_same_checkpoint_gives_the_same_bytes_however_it_is_sharded(tmp_path):
    single, sharded = (
        make_checkpoint(tmp_path / name, layers=4, max_shard_size=size) for name, size in (("a", "5GB"), ("b", "100KB"))
    )
    assert (sharded / INDEX_NAME).is_file()
    first = shrink(plan_shrink(single), tmp_path / "first", base_id="x")
    again = shrink(plan_shrink(single), tmp_path / "again", base_id="x")
    other = shrink(plan_shrink(sharded), tmp_path / "other", base_id="x")
    assert first.digest == again.digest
    assert first.files == other.files
    assert first.base.digest != other.base.digest


def test_a_package_in_several_shards_is_the_same_model(checkpoint, tmp_path, monkeypatch):
    plan = plan_shrink(checkpoint, embeddings="bf16")
    shrink(plan, tmp_path / "single")
    monkeypatch.setattr(shrink_module, "MAX_SHARD_BYTES", 30_000)
    manifest = shrink(plan, tmp_path / "sharded")
    assert sum(name.endswith(".safetensors") for name in manifest.files) > 3
    index = json.loads((tmp_path / "sharded" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == plan.package_bytes
    expected = logits_of(load_package(tmp_path / "single"))
    assert torch.equal(logits_of(load_package(tmp_path / "sharded")), expected)
    assert distance(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), expected) < 0.03


def test_what_a_model_directory_needs_comes_along_and_code_does_not(checkpoint, tmp_path, caplog):
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    for name in ("LICENSE.txt", "NOTICE"):
        (checkpoint / name).write_text("terms")
    code = ("tokenizer_evil.py", "modeling_evil.py", "LICENSE.py", "pytorch_model.bin")
    for name in (*code, "notes.txt", "tokenizer_training.jsonl", "LICENSE (1).txt"):
        (checkpoint / name).write_text("x")
    manifest = shrink(plan_shrink(checkpoint), tmp_path / "package", base_id="org/model", revision="v1")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE.txt"}
    assert set(manifest.files) == names | {"config.json", "model.safetensors", "NOTICE"}
    assert [record.message.partition("full/")[2] for record in caplog.records] == [
        "LICENSE (1).txt is left out; expected a name of letters, digits, '.', '_' and '-'."
    ]
    assert (manifest.base.id, manifest.base.revision, manifest.base.license) == ("org/model", "v1", "apache-2.0")
    assert load_tokenizer(tmp_path / "package").decode([1, 88]) == load_tokenizer(checkpoint).decode([1, 88])
    assert load_package(tmp_path / "package").generation_config.eos_token_id == 0


@pytest.mark.parametrize("card", ["", "no header", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [a]\n---\n"])
def test_a_card_without_a_licence_gives_none(checkpoint, card):
    (checkpoint / "README.md").write_text(card)
    assert shrink_module.read_license(checkpoint) == (None, None)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("license: other\nlicense_name: org-research\nlicense_link: LICENSE", ("org-research", "LICENSE")),
        ("license: other\nlicense_link: https://org.ai/terms", ("other", "https://org.ai/terms")),
        ("license: Other\nlicense_name: [a]\nlicense_link: 3", ("Other", None)),
        ("license: mit\nlicense_name: x\nlicense_link: y", ("mit", None)),
    ],
)
def test_a_licence_of_its_own_has_a_name_and_a_link(checkpoint, tmp_path, header, found):
    (checkpoint / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
    assert shrink_module.read_license(checkpoint) == found


def test_a_packages_base_has_the_link_of_its_licence(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n")
    shrink(plan_shrink(checkpoint), tmp_path / "package")
    base = read_manifest(tmp_path / "package", PackageManifest).base
    assert (base.license, base.license_link) == ("ours", "LICENSE")


def test_a_damaged_package_is_not_loaded(checkpoint, tmp_path):
    shrink(plan_shrink(checkpoint), tmp_path / "package")
    path = tmp_path / "package" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "model.safetensors has the digest" in sentence(load_package, tmp_path / "package", error=ArtifactError)


# Stock transformers


@every_family
def test_stock_transformers_loads_a_package_with_bf16_embeddings_as_the_same_model(package, family):
    directory = package(family)
    ours = logits_of(load_package(directory, dtype=torch.float32))
    stock, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values())
    quantized = [module for module in stock.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 3 * len(describe(load_config(full_of(directory))).linears)

    # Exactly, once its computation is in fp32; in training mode, as an evaluation would repack its weights (facts.md).
    for parameter in stock.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    for module in quantized:
        module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    torch.testing.assert_close(logits_of(stock.train()), ours, rtol=1e-5, atol=1e-5)

    # As it comes, in bf16, both are equally far from that.
    bf16 = distance(logits_of(AutoModelForCausalLM.from_pretrained(directory)), ours)
    assert bf16 < 0.02
    assert distance(logits_of(load_package(directory)), ours) < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("embeddings", ["int8", "nf4"])
def test_stock_transformers_refuses_a_package_it_would_misread(tmp_path, family, embeddings):
    directory = make_package(tmp_path / "package", family, embeddings=embeddings)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(("embeddings", "error"), [("bf16", 1e-9), ("int8", 0.05), ("nf4", 0.5)])
def test_compressed_embeddings_stay_near_the_exact_ones(checkpoint, tmp_path, embeddings, error):
    shrink(plan_shrink(checkpoint, embeddings="bf16"), tmp_path / "exact")
    shrink(plan_shrink(checkpoint, embeddings=embeddings), tmp_path / "package")
    exact = logits_of(load_package(tmp_path / "exact", dtype=torch.float32))
    assert distance(logits_of(load_package(tmp_path / "package", dtype=torch.float32)), exact) < error


# Failure


def test_an_output_is_overwritten_only_if_it_is_asked_for_and_ours(checkpoint, tmp_path):
    output = tmp_path / "package"
    first = shrink(plan_shrink(checkpoint, keep_layers=2), output)
    plan = plan_shrink(checkpoint, keep_layers=3)
    assert "exists already" in sentence(shrink, plan, output, error=OutputError)
    assert read_manifest(output, PackageManifest) == first
    second = shrink(plan, output, overwrite=True)
    assert read_manifest(output, PackageManifest) == second != first
    verify_files(output, second)
    assert "was not made by" in sentence(shrink, plan, checkpoint, overwrite=True, error=OutputError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "package"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    write, count = SafetensorsWriter.write, 0

    def write_until_full(self, name, tensor):
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", write_until_full)
    message = sentence(shrink, plan_shrink(checkpoint), tmp_path / "package", error=OutputError)
    assert "the disk is full" in message
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# Memory

_MEASURE = """
import sys
from pathlib import Path
from hf_fedlarge.shrink import plan_shrink, shrink

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

# Not ru_maxrss: a child inherits the peak of the process that started it.
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
shrink(plan_shrink(Path(sys.argv[1]), keep_layers=2), Path(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.fixture
def large_checkpoint(tmp_path):
    """(A Llama of about 600 MB in shards, the bytes of its largest tensor: the embedding's 105 MB)."""
    directory = tmp_path / "large"
    config = make_config("llama", layers=3)
    config.hidden_size, config.intermediate_size, config.vocab_size = 2048, 8192, 25_600
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 16, 128
    config.save_pretrained(directory)
    chunk = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards, weight_map, found = {}, {}, describe(config)
    for name, shape in found.parameters.items():
        file = f"shard-{found.layer_of(name)}.safetensors"
        shards.setdefault(file, {})[name] = (torch.bfloat16, shape)
        weight_map[name] = file
    for file, infos in shards.items():
        with SafetensorsWriter(directory / file, infos) as writer:
            for name, (_, shape) in infos.items():
                rest = torch.Size(shape).numel()
                while rest:
                    writer.write(name, chunk[: min(rest, len(chunk))])
                    rest -= min(rest, len(chunk))
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield directory, 25_600 * 2048 * 2
    shutil.rmtree(directory)


def test_shrinking_needs_memory_for_two_of_the_largest_tensor_only(large_checkpoint, tmp_path):
    directory, largest = large_checkpoint
    arguments = [sys.executable, "-c", _MEASURE, str(directory), str(tmp_path / "package")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    assert peak <= 2 * largest + 200e6
