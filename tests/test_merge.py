"""Merging against arithmetic that is exact, and against the stock libraries on the merged directory."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, make_checkpoint, make_config
from federation import plug_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_fedlarge.adapters import initial_factors, write_adapter
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import (
    AdapterManifest,
    CheckpointManifest,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry
from hf_fedlarge.errors import ArchitectureError, ArtifactError, OutputError
from hf_fedlarge.merge import STATE_NAME, merge, plan_merge
from hf_fedlarge.tensors import INDEX_NAME, CheckpointReader, Factors, SafetensorsWriter, checkpoint_digest, shard_names

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LORA = LoraSettings(rank=4, alpha=8.0)
BASE = BaseModelEntry(id="test/base", digest="0" * 64)
PACKAGE = "0" * 64

# Bits of precision and exponent of the smallest normal number.
FORMATS = {torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}


# --- oracles ---------------------------------------------------------------------------------------------------------


def merged_exactly(weight, factors, scale, transposed, dtype):
    """W + scale · B A with 64 bits of mantissa, rounded once: what every merged tensor must be."""
    delta = factors.B_OR.numpy().astype(np.longdouble) @ factors.A_RI.numpy().astype(np.longdouble)
    total = weight.double().numpy().astype(np.longdouble) + np.longdouble(scale) * (delta.T if transposed else delta)
    precision, smallest = FORMATS[dtype]
    exponents = np.maximum(np.frexp(total)[1] - 1, smallest) - precision + 1
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(total, -exponents)), exponents).astype(np.float64)).to(dtype)


# --- directories -----------------------------------------------------------------------------------------------------


def make_adapter(directory, checkpoint, config, lora=LORA, factors=None, base_digest=None):
    """An adapter of random factors on all layers, as a round would leave it."""
    architecture = describe(config)
    layers = list(range(architecture.layers))
    if factors is None:
        generator = torch.Generator().manual_seed(1)
        factors = {
            module: Factors(A_RI, 0.05 * torch.randn(B_OR.shape, generator=generator))
            for module, (A_RI, B_OR) in initial_factors(architecture, layers, lora, seed=0).items()
        }
    directory.mkdir()
    write_adapter(directory, factors, lora, architecture, BASE)
    seal_adapter(directory, base_digest or checkpoint_digest(checkpoint), layers, lora)
    return factors


def seal_adapter(directory, base_digest, layers=(0, 1), lora=LORA):
    manifest = AdapterManifest(
        files=describe_files(directory),
        base=BaseModelEntry(id="test/base", digest=base_digest),
        package=PACKAGE,
        parent=None,
        round=1,
        layers=list(layers),
        lora=lora,
        aggregator="exact",
    )
    write_manifest(directory, manifest)


def read_all(directory):
    reader = CheckpointReader(directory)
    return {name: reader.read(name) for name in reader.infos}


def make_pair(directory):
    """A checkpoint of several shards, its adapter, and where to merge them."""
    checkpoint = make_checkpoint(directory / "base", dtype=torch.float32, max_shard_size="200KB")
    make_adapter(directory / "adapter", checkpoint, make_config("llama"))
    return checkpoint, directory / "adapter", directory / "merged"


@pytest.fixture
def llama(tmp_path):
    return make_pair(tmp_path)


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_the_merge_rounded_once(tmp_path, family, dtype):
    config = make_config(family)
    max_shard_size = "5GB" if dtype == torch.float32 else "40KB"
    checkpoint = make_checkpoint(tmp_path / "base", family, dtype=dtype, max_shard_size=max_shard_size)
    lora = LoraSettings(rank=4, alpha=3.0, rslora=dtype == torch.float16)
    factors = make_adapter(tmp_path / "adapter", checkpoint, config, lora)
    manifest = merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")

    before, after = read_all(checkpoint), read_all(tmp_path / "merged")
    architecture = describe(config)
    assert sorted(manifest.merged) == sorted(factors)
    assert len(factors) == 2 * len(architecture.linears)
    names = architecture.tensor_names(before, checkpoint)
    expected = dict(before)
    for module, pair in factors.items():
        name = names[f"{module}.weight"]
        expected[name] = merged_exactly(before[name], pair, lora.scale, family == "gpt2", dtype)
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FAMILIES), *(("gpt2", dtype) for dtype in DTYPES[:2])],
)
def test_stock_libraries_agree(tmp_path, family, dtype):
    checkpoint = make_checkpoint(tmp_path / "base", family, dtype=dtype, max_shard_size="40KB")
    factors = make_adapter(tmp_path / "adapter", checkpoint, make_config(family))
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype

    # peft, which computes the product in the weight's or in single precision, is nowhere closer to the truth.
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours, weights = merged.state_dict(), {name: tensor.double() for name, tensor in base.state_dict().items()}
    theirs = plug_in(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for module, (A_RI, B_OR) in factors.items():
        name = f"{module}.weight"
        delta = LORA.scale * B_OR.double() @ A_RI.double()
        truth = weights[name] + (delta.T if family == "gpt2" else delta)
        assert ((ours[name].double() - truth).abs() <= (theirs[name].double() - truth).abs()).all()

    # The merged model computes what peft computes on base and adapter, but for the rounding of the weights.
    tokens = torch.arange(4, 28).reshape(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        unmerged = plain(tokens).logits
        truth = plug_in(plain, tmp_path / "adapter").eval()(tokens).logits
        found = merged.float()(tokens).logits
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert (found - truth).norm() <= tolerance * (truth - unmerged).norm()


def test_an_old_checkpoint_without_the_base_prefix(tmp_path):
    """GPT-2 on the Hub: no `transformer.` before the names, no head, and buffers that the model no longer has."""
    checkpoint = make_checkpoint(tmp_path / "base", "gpt2", dtype=torch.float32)
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    tensors["nothing"] = torch.zeros(0, 3)
    tensors["step"] = torch.tensor(7)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt", "made_by": "hand"})
    factors = make_adapter(tmp_path / "adapter", checkpoint, make_config("gpt2"))
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    after = read_all(tmp_path / "merged")
    for name, tensor in read_all(checkpoint).items():
        module = f"transformer.{name.removesuffix('.weight')}"
        if module in factors:
            tensor = merged_exactly(tensor, factors[module], LORA.scale, True, torch.float32)
        assert torch.equal(after[name], tensor), name
    with (
        safe_open(checkpoint / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged,
    ):
        assert merged.metadata() == base.metadata() == {"format": "pt", "made_by": "hand"}
        assert merged.offset_keys() == base.offset_keys() != base.keys()


def test_an_adapter_on_some_matrices_leaves_the_others(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base", max_shard_size="40KB")
    lora = LoraSettings(rank=2, alpha=2.0, targets=["q_proj", "mlp.down_proj"])
    factors = make_adapter(tmp_path / "adapter", checkpoint, make_config("llama"), lora)
    del factors["model.layers.0.mlp.down_proj"]
    (tmp_path / "adapter" / "fedlarge.json").unlink()
    write_adapter(tmp_path / "adapter", factors, lora, describe(make_config("llama")), BASE)
    seal_adapter(tmp_path / "adapter", checkpoint_digest(checkpoint), lora=lora)
    manifest = merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    after = read_all(tmp_path / "merged")
    changed = {name for name, tensor in read_all(checkpoint).items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{module}.weight" for module in factors}
    assert set(manifest.merged) == set(factors)


def test_an_empty_product_gives_the_same_bytes(tmp_path):
    """With B zero nothing changes: the shards are the base's, headers included."""
    checkpoint = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="40KB")
    config = make_config("llama")
    make_adapter(tmp_path / "adapter", checkpoint, config, factors=initial_factors(describe(config), [0, 1], LORA, 0))
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    assert checkpoint_digest(tmp_path / "merged") == checkpoint_digest(checkpoint)


# --- directories in and out ------------------------------------------------------------------------------------------


def test_files_beside_the_weights(llama):
    checkpoint, adapter, output = llama
    kept = ["config.json", "generation_config.json", INDEX_NAME, "tokenizer.json", "chat_template.jinja", "LICENSE"]
    kept += ["NOTICE.md", "USE_POLICY.md", "tokenizer.model"]
    dropped = ["README.md", "fedlarge.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    dropped += ["modeling_x.py", "consolidated.safetensors", "adapter_config.json", ".gitattributes", "two words.txt"]
    dropped += ["train.jsonl", "credentials.json", "wandb.log", "tokenizer_training.jsonl", "LICENSE (1).txt"]
    for name in [*kept[3:], *dropped]:
        (checkpoint / name).write_text(f"content of {name}\n")
    for folder, name in (("onnx", "model.onnx"), ("additional_chat_templates", "tool_use.jinja")):
        (checkpoint / folder).mkdir()
        (checkpoint / folder / name).write_text("another format")

    plan = plan_merge(checkpoint, adapter)
    assert sorted(plan.copied) == sorted(kept)
    assert sorted(plan.left_out) == sorted([*dropped, "onnx/", "additional_chat_templates/"])
    assert plan.nbytes == sum(tensor.nbytes for tensor in read_all(checkpoint).values())
    assert len(plan.shards) > 2
    said = plan.describe()
    assert "change 14 matrices in 2 layers (float32), scale 2" in said
    for name in (*plan.copied, *plan.left_out, *plan.shards):
        assert name in said
    assert not output.exists()

    manifest = merge(checkpoint, adapter, output)
    assert {path.name for path in output.iterdir()} == {*kept, *plan.shards, "fedlarge.json"}
    for name in kept:
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()
    assert read_manifest(output, CheckpointManifest) == manifest
    verify_files(output, manifest)
    assert manifest.base.digest == checkpoint_digest(checkpoint)
    assert manifest.adapter == read_manifest(adapter, AdapterManifest).digest
    assert list(output.parent.glob(".*")) == []


def test_code_that_is_left_out_is_not_named_either(llama):
    checkpoint, _, output = llama
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_x.Config"}}))
    (checkpoint / "configuration_x.py").write_text("class Config: pass\n")
    make_adapter(checkpoint.parent / "own", checkpoint, make_config("llama"))
    manifest = merge(checkpoint, checkpoint.parent / "own", output)
    assert json.loads((output / "config.json").read_text()) == config
    assert "configuration_x.py" not in manifest.files
    verify_files(output, manifest)
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)  # which would look for the code


def test_a_hub_snapshot_of_links_becomes_files(llama):
    checkpoint, adapter, output = llama
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for path in list(checkpoint.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    merge(checkpoint, adapter, output)
    assert all(path.is_file() and not path.is_symlink() for path in output.iterdir())


def test_an_adapter_comes_from_the_hub_with_a_card_and_as_links(llama):
    checkpoint, adapter, output = llama
    plain = merge(checkpoint, adapter, checkpoint.parent / "plain")
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for path in list(adapter.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    (adapter / "README.md").write_text("# A card")
    assert merge(checkpoint, adapter, output).files == plain.files


def test_a_merged_checkpoint_is_the_base_of_the_next_federation(llama):
    checkpoint, adapter, output = llama
    merge(checkpoint, adapter, output)
    again = checkpoint.parent / "again"
    make_adapter(again, output, make_config("llama"))
    second = merge(output, again, checkpoint.parent / "second")
    assert second.base.digest == checkpoint_digest(output)
    verify_files(checkpoint.parent / "second", second)


def test_progress_counts_every_byte_once(llama):
    checkpoint, adapter, output = llama
    seen = []
    merge(checkpoint, adapter, output, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == plan_merge(checkpoint, adapter).nbytes


def test_an_existing_output_is_kept_unless_told(llama):
    checkpoint, adapter, output = llama
    manifest = merge(checkpoint, adapter, output)
    with pytest.raises(OutputError, match="exists already"):
        merge(checkpoint, adapter, output)
    assert merge(checkpoint, adapter, output, overwrite=True) == manifest
    with pytest.raises(OutputError, match="not made by hf-fedlarge"):
        merge(checkpoint, adapter, checkpoint, overwrite=True)
    with pytest.raises(OutputError, match="choose another output"):
        merge(output, adapter, output, overwrite=True)
    with pytest.raises(OutputError, match="choose another output"):
        merge(checkpoint, adapter, adapter, overwrite=True)


def test_an_output_that_cannot_be_written(llama, monkeypatch):
    checkpoint, adapter, output = llama
    (checkpoint.parent / "file").write_text("not a directory")
    with pytest.raises(OutputError, match="a parent of it is a file"):
        merge(checkpoint, adapter, checkpoint.parent / "file" / "deeper" / "merged")

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(OutputError, match="the disk is full"):
            merge(checkpoint, adapter, output)
    assert not output.exists()
    merge(checkpoint, adapter, output)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_base_is_refused(llama):
    checkpoint, adapter, output = llama
    expected = checkpoint_digest(checkpoint)
    shard = checkpoint / CheckpointReader(checkpoint).files[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    found = checkpoint_digest(checkpoint)
    with pytest.raises(ArtifactError, match=rf"digest {found[:12]}.*test/base with the digest {expected[:12]}"):
        merge(checkpoint, adapter, output)
    assert not output.exists()


def test_the_digest_is_of_what_the_checkpoint_computes(llama):
    checkpoint, _, _ = llama
    digest = checkpoint_digest(checkpoint)
    (checkpoint / "README.md").write_text("a card")
    assert checkpoint_digest(checkpoint) == digest
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert checkpoint_digest(checkpoint) != digest


def test_a_directory_of_another_kind_is_refused(llama):
    checkpoint, adapter, output = llama
    with pytest.raises(ArtifactError, match=r"has no fedlarge\.json"):
        merge(checkpoint, checkpoint, output)
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        merge(adapter.parent / "blank", adapter, output)
    merge(checkpoint, adapter, output)
    with pytest.raises(ArtifactError, match="is of kind 'checkpoint'; expected an adapter"):
        merge(checkpoint, output, output.parent / "other")


def test_a_damaged_adapter_is_refused(llama):
    checkpoint, adapter, output = llama
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="its manifest says"):
        merge(checkpoint, adapter, output)


def rewrite_adapter(adapter, checkpoint, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "fedlarge.json").unlink()
    seal_adapter(adapter, checkpoint_digest(checkpoint))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", (4, 64)),
        ("base_model.model.lm_head.lora_A.weight", (4, 64)),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 300)),
        ("base_model.model.model.layers.0.input_layernorm.lora_A.weight", (4, 64)),
        (f"{Q_PROJ}.lora_magnitude_vector", (64,)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 64)),
    ],
)
def test_a_tensor_that_belongs_to_no_matrix_is_refused(llama, name, shape):
    checkpoint, adapter, output = llama
    rewrite_adapter(adapter, checkpoint, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ArtifactError, match=f"{name}, which belongs to no matrix in the 2 blocks"):
        merge(checkpoint, adapter, output)


@pytest.mark.parametrize("shape", [None, (64, 5), (4, 64), (63, 4), (1,)])
def test_a_factor_that_does_not_fit_is_refused(llama, shape):
    checkpoint, adapter, output = llama

    def change(tensors):
        del tensors[f"{Q_PROJ}.lora_B.weight"]
        if shape:
            tensors[f"{Q_PROJ}.lora_B.weight"] = torch.zeros(shape)

    rewrite_adapter(adapter, checkpoint, change)
    with pytest.raises(
        ArtifactError, match=r"the matrix model\.layers\.0\.self_attn\.q_proj of .*; expected .*\(64, 4\)"
    ):
        merge(checkpoint, adapter, output)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e6), (torch.float32, math.nan)], ids=str)
def test_a_value_beyond_the_dtype_is_refused_and_named(tmp_path, dtype, value):
    checkpoint = make_checkpoint(tmp_path / "base", dtype=dtype)
    factors = make_adapter(tmp_path / "adapter", checkpoint, make_config("llama"))
    rewrite_adapter(
        tmp_path / "adapter", checkpoint, lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"][3].fill_(value)
    )
    assert factors
    with pytest.raises(ArtifactError, match=rf"model\.layers\.0\.self_attn\.q_proj\.weight that {dtype} can't hold"):
        merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_matrix_in_integers_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "base")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    make_adapter(tmp_path / "adapter", checkpoint, make_config("llama"))
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj\.weight as torch\.int8"):
        merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")


def test_a_quantized_or_custom_checkpoint_is_refused(llama):
    checkpoint, adapter, output = llama
    config = json.loads((checkpoint / "config.json").read_text())
    custom = {"auto_map": {"AutoModel": "x.Y"}, "model_type": "x"}
    for extra in ({"quantization_config": {"quant_method": "gptq"}}, custom):
        (checkpoint / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(ArchitectureError, match=r"quantized already|custom code"):
            merge(checkpoint, adapter, output)


# --- interruptions and memory ----------------------------------------------------------------------------------------


def bytes_of_first_shard(checkpoint):
    reader = CheckpointReader(checkpoint)
    return sum(info.nbytes for info in reader.infos.values() if info.file == reader.files[0])


def make_large_pair(directory):
    """400 MB in four shards, the largest tensor of 64 MB, and an adapter."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    checkpoint = directory / "base"
    config.save_pretrained(checkpoint)
    shapes = describe(config).parameters
    rows = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weight_map = {}
    for number in range(4):
        names = list(shapes)[number::4]
        file = shard_names(4)[number]
        weight_map |= dict.fromkeys(names, file)
        with SafetensorsWriter(checkpoint / file, {name: (torch.bfloat16, shapes[name]) for name in names}) as writer:
            for name in names:
                left = math.prod(shapes[name])
                while left:
                    writer.write(name, rows[:left])
                    left -= min(left, len(rows))
    (checkpoint / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    make_adapter(directory / "adapter", checkpoint, config)
    return checkpoint, directory / "adapter", directory / "merged"


MEASURED_THEN_KILLED = """
import os, signal, sys
from pathlib import Path
from hf_fedlarge.merge import merge

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

paths = [Path(path) for path in sys.argv[1:7]]
before = memory("VmRSS")
merge(*paths[:3])
print(memory("VmHWM") - before, flush=True)
limit = int(sys.argv[7])
merge(*paths[3:], progress=lambda done: done > limit and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A process that measures its memory over a large merge, and is killed in the second shard of a small one."""
    large, small = make_large_pair(tmp_path_factory.mktemp("large")), make_pair(tmp_path_factory.mktemp("small"))
    arguments = [*large, *small, bytes_of_first_shard(small[0])]
    # One thread: on a busy machine threads that wait for one another take several times as long.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED_THEN_KILLED, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    yield large, small, int(ended.stdout)
    shutil.rmtree(large[0].parent)  # pytest would keep three of these


def test_peak_memory_is_a_few_blocks(process):
    (checkpoint, _, _), _, peak = process
    infos = CheckpointReader(checkpoint).infos.values()
    largest = max(info.nbytes for info in infos)
    assert largest == 64 * 2**20
    assert sum(info.nbytes for info in infos) > 390e6
    assert peak <= 2 * largest + 200 * 2**20  # what a user may count on
    assert peak <= 150 * 2**20  # what it takes, with room to spare: 50 MB were measured


def test_a_killed_merge_goes_on_and_gives_the_same_bytes(process):
    _, (checkpoint, adapter, output), _ = process
    files = CheckpointReader(checkpoint).files
    assert not output.exists()
    staging = output.with_name(f".{output.name}.partial")
    assert (staging / STATE_NAME).is_file()
    assert (staging / f".{files[1]}.partial").is_file()
    finished = (staging / files[0]).stat()

    seen = []
    manifest = merge(checkpoint, adapter, output, progress=seen.append)
    assert seen[0] == bytes_of_first_shard(checkpoint)
    assert (output / files[0]).stat().st_mtime_ns == finished.st_mtime_ns
    verify_files(output, manifest)
    assert not staging.exists()
    reference = output.with_name("reference")
    assert merge(checkpoint, adapter, reference) == manifest
    assert {path.name for path in output.iterdir()} == {path.name for path in reference.iterdir()}
    for path in reference.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def stop_after_first_shard(checkpoint, adapter, output):
    first = bytes_of_first_shard(checkpoint)

    def stop(done):
        if done > first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(checkpoint, adapter, output, progress=stop)
    return output.with_name(f".{output.name}.partial"), first


def test_a_damaged_finished_shard_is_written_again(llama):
    checkpoint, adapter, output = llama
    reference = merge(checkpoint, adapter, output.parent / "reference")
    staging, first = stop_after_first_shard(checkpoint, adapter, output)
    with (staging / CheckpointReader(checkpoint).files[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    (staging / "stray").mkdir()
    seen = []
    assert merge(checkpoint, adapter, output, progress=seen.append) == reference
    assert seen[0] < first
    verify_files(output, reference)


def test_another_merge_does_not_take_the_shards_over(llama):
    checkpoint, adapter, output = llama
    _, first = stop_after_first_shard(checkpoint, adapter, output)
    rewrite_adapter(adapter, checkpoint, lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].neg_())
    seen = []
    found = merge(checkpoint, adapter, output, progress=seen.append)
    assert seen[0] < first
    assert found == merge(checkpoint, adapter, output.parent / "reference")
