"""Hostile input: what is refused, with its cause, in little time and memory, and that nothing of it is ever run."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from federation import LORA, make_examples, make_federation, make_update
from jinja2.exceptions import SecurityError, UndefinedError
from round_driver import CLIENTS, check_ins, config
from safetensors.torch import load_file, save_file

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, expected_shapes
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import (
    MANIFEST_NAME,
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    describe_files,
    file_entry,
    read_manifest,
)
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates, expected_from
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.errors import ArtifactError, FedLargeError, UpdateRefusedError
from hf_fedlarge.experience import seen
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import SIGNATURE_NAME, allow, new_key, read_allowed
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import load_package, load_tokenizer, package_config
from hf_fedlarge.plan import sample_cohort
from hf_fedlarge.server import RoundServer
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.client import parse_arguments, train_client
from hf_fedlarge.update import (
    MAX_NORM,
    MAX_SMALL_BYTES,
    Asked,
    Expected,
    client_name,
    measured,
    open_update,
    outcome,
    validate_update,
)
from hf_fedlarge.wire import ENCODED_WEIGHTS

# `FUZZED=100000 pytest tests/test_hostile.py -k mutation` takes longer and finds more.
FUZZED = int(os.environ.get("FUZZED", "10000"))
# Of a rank with which an update may have 45 MB: room for much that is hostile.
WIDE = LoraSettings(rank=4096, alpha=8.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter of round 0, ann's signed update, and the list of keys that has hers."""
    path = tmp_path_factory.mktemp("hostile")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=0)
    allow(path / "allowed.json", new_key(path / "ann.pem", "ann"))
    make_update(path / "ann", path / "package", "ann", adapter=path / "start", key=path / "ann.pem")
    return path


@pytest.fixture(scope="module")
def expected(home):
    package = read_manifest(home / "package", PackageManifest)
    start = read_manifest(home / "start", AdapterManifest)
    return Expected(
        package, describe(package_config(home / "package")), LORA, 1, start.digest, asked=Asked("ann", 100, 1000)
    )


@pytest.fixture
def update(home, tmp_path):
    shutil.copytree(home / "ann", tmp_path / "ann")
    (tmp_path / "ann" / SIGNATURE_NAME).unlink()
    return tmp_path / "ann"


def edit(update, **changes):
    path = update / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rehash(update, name=ADAPTER_WEIGHTS):
    """Make the manifest agree with a file, as somebody hostile would."""
    raw = json.loads((update / MANIFEST_NAME).read_text())
    raw["files"][name] = file_entry(update / name).model_dump()
    (update / MANIFEST_NAME).write_text(json.dumps(raw))


def write_weights(update, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (update / ADAPTER_WEIGHTS).write_bytes((length or len(header)).to_bytes(8, "little") + header + data)
    rehash(update)


def edit_tensors(change):
    def spoil(update):
        tensors = load_file(update / ADAPTER_WEIGHTS)
        name = sorted(tensors)[0]
        change(tensors, name)
        save_file(tensors, update / ADAPTER_WEIGHTS)
        rehash(update)

    return spoil


def put(value):
    def change(tensors, name):
        tensors[name].view(-1)[3] = value

    return edit_tensors(change)


def cast(dtype):
    return edit_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))


def renamed(name):
    return edit_tensors(lambda tensors, old: tensors.update({name: tensors.pop(old)}))


def weights(change):
    """Change the bytes of the weights and make the manifest agree."""

    def spoil(update):
        (update / ADAPTER_WEIGHTS).write_bytes(change((update / ADAPTER_WEIGHTS).read_bytes()))
        rehash(update)

    return spoil


def manifest_text(old, new):
    def spoil(update):
        text = (update / MANIFEST_NAME).read_text()
        assert old in text
        (update / MANIFEST_NAME).write_text(text.replace(old, new, 1))

    return spoil


def file_beside(name, content=b"raise SystemExit", listed=False):
    def spoil(update):
        (update / name).write_bytes(content)
        if listed:
            rehash(update, name)

    return spoil


def link(name):
    def spoil(update):
        (update / name).rename(update.parent / "elsewhere")
        (update / name).symlink_to(update.parent / "elsewhere")

    return spoil


def of_files(size):
    def spoil(update):
        files = json.loads((update / MANIFEST_NAME).read_text())["files"]
        with (update / ADAPTER_WEIGHTS).open("r+b") as file:
            file.truncate(size)
        edit(update, files=files | {ADAPTER_WEIGHTS: files[ADAPTER_WEIGHTS] | {"size": size}})

    return spoil


def empty_tensors(count):
    tensors = (b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    return b"{" + b",".join(tensors) + b"}"


def pickled(update):
    (update / ADAPTER_WEIGHTS).write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.")
    rehash(update)


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
CORPUS = {
    # the file of weights
    "cut": (weights(lambda raw: raw[:-100]), "not a readable safetensors file"),
    "cut, not said": (lambda update: os.truncate(update / ADAPTER_WEIGHTS, 100), "has 100 bytes; its manifest says"),
    "longer": (weights(lambda raw: raw + b"\0" * 64), "not a readable safetensors file"),
    "empty": (weights(lambda raw: b""), "is not JSON"),
    "a byte": (weights(lambda raw: b"\x01"), "is not JSON"),
    "header of an exabyte": (lambda update: write_weights(update, b"{}", length=2**60), "announces a header of 11529"),
    "header longer than the file": (lambda update: write_weights(update, b"{}", length=999), "not a readable"),
    "key twice": (lambda update: write_weights(update, TWICE, b"\0" * 4), "holds a key twice"),
    "nested deeply": (lambda update: write_weights(update, b'{"a":' + b"[" * 30_000), "is not JSON"),
    "number of many digits": (lambda update: write_weights(update, b'{"a":' + b"9" * 9000 + b"}"), "is not JSON"),
    "not UTF-8": (lambda update: write_weights(update, b'{"\xff":1}'), "is not JSON"),
    "list": (lambda update: write_weights(update, b"[]"), "not a readable safetensors file"),
    "negative shape": (
        lambda update: write_weights(update, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "not a readable safetensors file",
    ),
    "shape that overflows": (
        lambda update: write_weights(update, {"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
        "not a readable safetensors file",
    ),
    "pickle by another name": (pickled, "announces a header of"),
    "path for a name": (renamed("../../etc/passwd"), "its tensor '../../etc/passwd' is not expected"),
    "escape for a name": (renamed("\x1b[2J\n\u202e"), r"its tensor '\\x1b\[2J\\n\\u202e' is not expected"),
    "long name": (renamed("a" * 50_000), "its tensor 'a{200}' is not expected"),
    "3,000 tensors": (lambda update: write_weights(update, empty_tensors(3_000)), "its files have"),
    "900 tensors": (lambda update: write_weights(update, empty_tensors(900)), "is (missing|not expected)"),
    "no tensor": (lambda update: write_weights(update, b"{}"), "is missing"),
    "NaN": (put(torch.nan), "holds NaN or infinity"),
    "infinity": (put(-torch.inf), "holds NaN or infinity"),
    "3e38": (put(3e38), r"has the norm 3e\+38; expected at most 1e\+06"),
    "a number for a matrix": (
        edit_tensors(lambda tensors, name: tensors.update({name: torch.zeros(1)})),
        r"is torch.float32 \(1,\); expected torch.float32 \(4, ",
    ),
    "float64": (cast(torch.float64), "its files have|is torch.float64"),
    "float16": (cast(torch.float16), "is torch.float16"),
    "complex64": (cast(torch.complex64), "in C64; supported are"),
    "float8": (cast(torch.float8_e4m3fn), "in F8_E4M3; supported are"),
    # the directory
    "code": (file_beside("modeling.py"), "holds modeling.py, which its manifest does not list"),
    "code, listed": (file_beside("modeling.py", listed=True), "only adapter_config.json and adapter_model.safetensors"),
    "pickle": (file_beside("adapter_model.pkl"), "holds adapter_model.pkl"),
    "pickle, listed": (file_beside("pytorch_model.bin", listed=True), "only adapter_config.json and adapter_model"),
    "name with an escape": (file_beside("\x1b[2J"), r"holds \?\[2J, which"),
    "name that is no text": (file_beside(os.fsdecode(b"\xff")), r"holds \?, which"),
    "link": (link(ADAPTER_WEIGHTS), "is not a regular file"),
    "link for a config": (link(ADAPTER_CONFIG), "is not a regular file"),
    "link for a manifest": (link(MANIFEST_NAME), "is not a regular file"),
    "long config": (
        lambda update: (update / ADAPTER_CONFIG).write_bytes(b" " * 2**20) and rehash(update, ADAPTER_CONFIG),
        "its files have",
    ),
    "10 GB": (of_files(10**10), "its files have 10000"),
    "10 GB, not said": (lambda update: os.truncate(update / ADAPTER_WEIGHTS, 10**10), "has 10000000000 bytes; its"),
    # the manifest
    "manifest of 20 MB": (lambda update: (update / MANIFEST_NAME).write_bytes(b"[" * 20_000_000), "expected at most"),
    "manifest of 64 KiB": (
        lambda update: edit(update, measured={"x" * MAX_SMALL_BYTES: 1.0}),
        "expected at most 65536",
    ),
    "manifest nested deeply": (lambda update: (update / MANIFEST_NAME).write_bytes(b"[" * 60_000), "is not JSON"),
    "client twice": (manifest_text('"client"', '"client": "bob", "client"'), "holds a key twice"),
    "1,000 files": (
        lambda update: edit(update, files={f"f{n}": {"size": 0, "sha256": ""} for n in range(1000)}),
        "sha256: String should match",
    ),
    "file elsewhere": (manifest_text(f'"{ADAPTER_CONFIG}"', '"../config.json"'), "files"),
    "-1 examples": (lambda update: edit(update, examples=-1), "examples: Input should be greater than or equal to 0"),
    "0 examples": (lambda update: edit(update, examples=0), "it claims 0 examples and 100 tokens; expected 1 to 100"),
    "NaN examples": (lambda update: edit(update, examples=float("nan")), "examples: Input should be a"),
    "1e30 examples": (lambda update: edit(update, examples=1e30), "examples: Input should be"),
    "10**30 examples": (lambda update: edit(update, examples=10**30), "examples: Input should be less"),
    "more examples than it has": (lambda update: edit(update, examples=101), "claims 101 examples"),
    "-1 tokens": (lambda update: edit(update, tokens=-1), "tokens: Input should be greater"),
    "0 tokens": (lambda update: edit(update, tokens=0), "0 tokens; expected 1 to 100 and 1 to 1000"),
    "NaN tokens": (lambda update: edit(update, tokens=float("nan")), "tokens: Input should be a"),
    "1e30 tokens": (lambda update: edit(update, tokens=1e30), "tokens: Input should be"),
    "more tokens than it can": (lambda update: edit(update, tokens=1001), "1001 tokens"),
    "infinite loss": (lambda update: edit(update, loss_after=float("inf")), "loss_after: Input should be a finite"),
    "a loss of 1.7e308": (lambda update: edit(update, loss_before=1.7e308), "loss_before: Input should be less"),
    "a loss of -1.7e308": (lambda update: edit(update, loss_after=-1.7e308), "loss_after: Input should be greater"),
    "NaN measured": (lambda update: edit(update, measured={"seconds": float("nan")}), "measured.seconds: Input"),
    "another's name": (lambda update: edit(update, client="bob"), "in the name of bob; expected ann"),
    "path for a client": (lambda update: edit(update, client="../../x"), "client: String should match"),
    "rank of 2**40": (lambda update: edit(update, lora=LORA.model_dump() | {"rank": 2**40}), "rank: Input should be"),
    "stale": (lambda update: edit(update, round=0), "it is for round 0; expected round 1"),
    "ahead": (lambda update: edit(update, round=2), "it is for round 2; expected round 1"),
    "wrong base": (lambda update: edit(update, package="0" * 64), "trained on the package 000000000000…; expected"),
    "wrong adapter": (lambda update: edit(update, adapter="0" * 64), "from the adapter 000000000000…; expected"),
}


def measure(update, expected):
    """What validation says in a process of its own, the seconds of CPU that it took, and the memory on top."""

    def validate(pipe):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        said = judge(update, expected)[1]
        taken = time.process_time() - began
        pipe.send((said, taken, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))

    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=validate, args=(sending,))
    process.start()
    sending.close()
    result = receiving.recv()
    process.join()
    return result


@pytest.mark.parametrize("name", CORPUS)
def test_what_is_hostile_is_refused_with_its_cause_at_little_cost(update, expected, name):
    spoil, cause = CORPUS[name]
    spoil(update)
    sentence, seconds, memory = measure(update, expected)
    assert sentence.startswith("ann refused: ")
    assert re.search(cause, sentence), sentence
    assert sentence.isprintable()
    assert len(sentence) < 1100
    assert seconds < 1
    assert memory < 200e6


@pytest.mark.parametrize("count", [500, 200_000])
def test_tensors_are_counted_before_one_is_opened_however_large_an_update_may_be(update, expected, count):
    edit(update, lora=WIDE.model_dump())
    write_weights(update, empty_tensors(count))
    sentence, seconds, memory = measure(update, replace(expected, lora=WIDE))
    assert re.search("announces a header of 1[0-9]{7} bytes" if count > 500 else "is (missing|not)", sentence), sentence
    assert seconds < 1
    assert memory < 200e6


# Not once more, not by two at a time


def test_an_update_counts_in_its_round_alone(home, update, expected, tmp_path):
    aggregate_updates([update], home / "package", tmp_path / "next", previous=home / "start")
    digest = read_manifest(tmp_path / "next", AdapterManifest).digest
    second = replace(expected, round=2, adapter=digest)
    with pytest.raises(UpdateRefusedError, match="ann refused: it is for round 1; expected round 2"):
        validate_update(update, second)
    edit(update, round=2)
    with pytest.raises(UpdateRefusedError, match="ann refused: it started from the adapter"):
        validate_update(update, second)


@pytest.mark.parametrize("alike", [True, False])
def test_of_eight_at_once_under_one_name_one_counts(home, expected, tmp_path, alike):
    updates = [home / "ann"] * 8
    if not alike:
        updates = [tmp_path / f"{number}" for number in range(8)]
        for seed, directory in enumerate(updates):
            make_update(directory, home / "package", "ann", seed=seed, adapter=home / "start")
    journal = Journal(tmp_path / "journal.jsonl")
    server = RoundServer(
        tmp_path / "rounds",
        1,
        journal,
        config(cohort=None),
        lambda number, client, directory: validate_update(directory, expected),
    )
    order = server.open(check_ins())
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda directory: server.receive(order, "ann", directory), updates))
    accepted = [receipt for receipt in receipts if receipt.accepted]
    assert len(accepted) == (8 if alike else 1)  # the same one eight times gets the same receipt
    assert len(set(accepted)) == 1
    assert all("it sent more than one update" in receipt.reason for receipt in receipts if not receipt.accepted)
    assert [entry["digest"] for entry in journal.find("validated", accepted=True)] == [accepted[0].digest]
    assert Journal(tmp_path / "journal.jsonl").entries == journal.entries
    assert read_manifest(server.work / "ann", UpdateManifest).digest == accepted[0].digest


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 5e-324, 1.7e308])
def test_a_client_that_lies_about_its_speed_stops_no_draw(home, seconds):
    journal = [
        {"event": "received", "client": client, "tokens": 100, "seconds": took}
        for client, took in zip(CLIENTS, (1.0, 2.0, 4.0, seconds), strict=True)
    ]
    past = SimpleNamespace(find=lambda event, **_: [entry for entry in journal if entry["event"] == event])
    assert len(sample_cohort(seen(check_ins(), past), 3, 0, 2, selection="resources")) == 3


# What the server's own package may hold


def reseal(package):
    raw = json.loads((package / MANIFEST_NAME).read_text())
    raw["files"] = {name: entry.model_dump() for name, entry in describe_files(package).items()}
    (package / MANIFEST_NAME).write_text(json.dumps(raw))


def canary(path, where):
    """Code that would leave a file behind."""
    path.write_text(f"open({str(where)!r}, 'w').close()\n\nclass Evil:\n    pass\n")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}, "asks for custom code"),
        ({"auto_map": {"AutoConfig": "evil.Evil"}, "trust_remote_code": True}, "asks for custom code"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "asks for custom code"),
        ({"model_type": "evil"}, "the unknown architecture 'evil'"),
        ({"model_type": ["llama"]}, "the unknown architecture"),
        ({"_attn_implementation": "evil/kernel"}, "asks for code of the Hub ('_attn_implementation')"),
        ({"attn_implementation": {"": "evil/kernel@main"}}, "asks for code of the Hub"),
        ({"num_labels": 10**9}, "has 1000000000 labels; a language model has none"),
        ({"num_hidden_layers": "many"}, "is no configuration of llama: "),
        ({"num_hidden_layers": -1}, "it has 0 stacks of -1 decoder blocks"),
        ({"num_attention_heads": 0}, "is no configuration of llama: ZeroDivisionError"),
        ({"hidden_act": "evil"}, "No llama model can be made of its config.json: KeyError, 'evil'"),
        ({"vocab_size": 2**60}, "No llama model can be made"),
    ],
)
def test_a_package_s_config_runs_nothing_and_is_refused_in_a_sentence(home, tmp_path, changes, cause):
    package = shutil.copytree(home / "package", tmp_path / "package")
    raw = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(raw | changes))
    reseal(package)
    canary(package / "evil.py", tmp_path / "canary")  # which verifying would refuse by its name
    with pytest.raises(FedLargeError) as refused:
        load_package(package, verify=False)
    assert cause in str(refused.value)
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_with_code_of_its_own_is_not_run(home, tmp_path):
    package = shutil.copytree(home / "package", tmp_path / "package")
    path = package / "tokenizer_config.json"
    raw = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(raw))
    canary(package / "evil.py", tmp_path / "canary")
    with suppress(ArtifactError):  # transformers may take a stock one instead
        load_tokenizer(package)
    assert not (tmp_path / "canary").exists()


def test_an_adapter_config_is_never_parsed_whatever_it_asks_for(home, update, expected, tmp_path):
    hostile = {"peft_type": "EVIL", "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    hostile |= {"base_model_name_or_path": "/etc", "target_modules": "(a+)+$", "r": 2**60, "trust_remote_code": True}
    (update / ADAPTER_CONFIG).write_text(json.dumps(hostile))
    canary(tmp_path / "evil.py", tmp_path / "canary")
    rehash(update, ADAPTER_CONFIG)
    validate_update(update, expected)
    aggregate_updates([update], home / "package", tmp_path / "next", previous=home / "start")
    assert "EVIL" not in (tmp_path / "next" / ADAPTER_CONFIG).read_text()
    assert not (tmp_path / "canary").exists()


def test_a_chat_template_reaches_no_python_and_is_the_server_s_under_its_digest(home, tmp_path):
    tokenizer = load_tokenizer(home / "package")
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**12) %}{% endfor %}",
    ):
        with pytest.raises((SecurityError, UndefinedError, OverflowError)):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)
    package = shutil.copytree(home / "package", tmp_path / "package")
    [path] = package.glob("chat_template*")
    path.write_text("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja has"):
        load_package(package)


def test_a_client_says_which_examples_a_chat_template_fails_on(home, tmp_path, capsys):
    package = shutil.copytree(home / "package", tmp_path / "package")
    [path] = package.glob("chat_template*")
    path.write_text("{% for i in range(10**12) %}{% endfor %}")
    reseal(package)
    data = make_examples(tmp_path / "data.jsonl")
    words = ["train", "--package", package, "--data", data, "--output", tmp_path / "update", "--disable_tqdm", "True"]
    assert main([str(word) for word in words]) == 2
    assert f"{data} can't be trained on: Range too big" in capsys.readouterr().err
    assert not (tmp_path / "update").exists()


class Leaves:
    """As a pickle, code that leaves a file behind when it is loaded."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return open, (str(self.where), "w")


def hostile_files(where):
    """Files by name that leave `where` behind when they are run, imported or unpickled."""
    code = f"open({str(where)!r}, 'w').close()\n".encode()
    pickled = pickle.dumps(Leaves(where))
    pickle.loads(pickled).close()
    where.unlink()  # so it is what it should be
    return {
        **dict.fromkeys(["modeling.py", "__init__.py", "sitecustomize.py", "modeling.pyc"], code),
        **dict.fromkeys(["model.pkl", "pytorch_model.bin", "optimizer.PT", "training_args.bin", "x.pickle"], pickled),
    }


def test_code_and_pickles_in_an_update_are_refused_by_name_and_never_run(home, expected, tmp_path):
    for listed in (False, True):
        for name, content in hostile_files(tmp_path / "canary").items():
            update = shutil.copytree(home / "ann", tmp_path / f"{name}{listed}" / "ann")
            (update / SIGNATURE_NAME).unlink()
            file_beside(name, content, listed=listed)(update)
            with pytest.raises(UpdateRefusedError, match=f"ann refused: .*{re.escape(name)}"):
                validate_update(update, expected)
            with pytest.raises(UpdateRefusedError, match=re.escape(name)):
                aggregate_updates([update], home / "package", tmp_path / "next", previous=home / "start")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("part", ["package", "start"])
def test_code_and_pickles_in_a_package_or_an_adapter_are_refused_by_name_and_never_run(home, tmp_path, part):
    make_examples(tmp_path / "data.jsonl")
    for name, content in hostile_files(tmp_path / "canary").items():
        for other in ("package", "start"):
            shutil.copytree(home / other, tmp_path / name / other)
        directory = tmp_path / name / part
        (directory / name).write_bytes(content)
        words = ["train", "--package", directory.parent / "package", "--adapter", directory.parent / "start"]
        words += ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "update", "--disable_tqdm", "True"]
        for listed in (False, True):
            if listed:
                reseal(directory)
            with pytest.raises(FedLargeError, match=re.escape(name)):
                train_client(*parse_arguments([str(word) for word in words[1:]]))
            with pytest.raises(FedLargeError, match=re.escape(name)):
                load_package(directory) if part == "package" else Store(str(tmp_path / "store")).put(directory)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "update").exists()


# Mutations

WORDS = [
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"{",
    b"}",
    b"[",
    b"\\ud800",
    b"9" * 30,
    b"\xff",
    b"\0",
    b",",
    b":",
    b" ",
]
VALUES = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    "x" * 999,
    "\ud800",
    "\x1b[2J",
    "../x",
    [],
    {},
    [[]],
]


def mutate(raw, random):
    """Bytes with up to eight changes: bits flipped, bytes put in, taken out, repeated or cut off."""
    raw = bytearray(raw)
    for _ in range(random.integers(1, 9)):
        place, length = int(random.integers(len(raw) + 1)), int(random.integers(1, 40))
        match random.integers(6):
            case 0 | 1 if place < len(raw):
                raw[place] ^= 1 << random.integers(8)
            case 2:
                raw[place:place] = random.bytes(length)
            case 3:
                raw[place : place + length] = b""
            case 4:
                raw[place : place + random.integers(3)] = WORDS[random.integers(len(WORDS))]
            case _:
                raw[place:place] = raw[place : place + length]
        if random.integers(40) == 0:
            del raw[place:]
    return bytes(raw)


def mutate_json(raw, random):
    """A value somewhere in a JSON object replaced, removed, or put under another key."""
    root = json.loads(raw)
    inside = root
    while True:
        key = (
            list(inside)[random.integers(len(inside))]
            if isinstance(inside, dict)
            else int(random.integers(len(inside)))
        )
        value = inside[key]
        if not isinstance(value, dict | list) or not value or random.integers(4) == 0:
            break
        inside = value
    match random.integers(4):
        case 0 if isinstance(inside, dict):
            inside[str(VALUES[random.integers(len(VALUES))])] = inside.pop(key)
        case 1:
            del inside[key]
        case _:
            inside[key] = VALUES[random.integers(len(VALUES))]
    return json.dumps(root).encode()


def mutate_header(raw, random):
    """The same for a safetensors file's header."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = mutate_json(raw[8:end], random)
    return len(header).to_bytes(8, "little") + header + raw[end:]


def judge(update, expected):
    """The manifest of an update that was accepted, or why it was refused."""
    try:
        return validate_update(update, expected), ""
    except UpdateRefusedError as error:
        return None, str(error)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_no_mutation_of_an_update_is_accepted_unless_it_is_harmless(home, expected, tmp_path, signed, codec):
    """Signed: nothing but what lies outside of the digest. Unsigned, and the manifest made to agree: finite factors."""
    lora = LoraSettings(rank=2, alpha=8.0, targets=["self_attn.q_proj"])
    start = start_adapter(home / "package", tmp_path / "start", lora, seed=0)
    wanted = Codec(name=codec)
    expected = replace(
        expected_from(tmp_path / "start", start, home / "package", 1, wanted),
        asked=expected.asked,
        keys=read_allowed(home / "allowed.json") if signed else None,
    )
    update, random = tmp_path / "ann", np.random.default_rng(FUZZED)
    make_update(
        update,
        home / "package",
        "ann",
        lora=lora,
        adapter=tmp_path / "start",
        codec=None if codec == "fp32" else wanted,
        key=home / "ann.pem",
    )
    sound = {path.name: path.read_bytes() for path in update.iterdir()}
    original = validate_update(update, expected)
    [weights] = {ADAPTER_WEIGHTS, ENCODED_WEIGHTS} & set(sound)
    names, accepted = [MANIFEST_NAME, MANIFEST_NAME, weights, weights, *sound], 0
    for number in range(FUZZED // 4):
        name = names[number % len(names)]
        change = mutate
        if number % 2 and name != ADAPTER_CONFIG:
            change = mutate_header if name == weights else mutate_json
        (update / name).write_bytes(change(sound[name], random))
        if name in original.files and not signed:
            rehash(update, name)
        assert outcome(update).isprintable()
        assert client_name(update)
        measured(update)
        manifest, sentence = judge(update, expected)
        assert sentence.isprintable()
        assert manifest or sentence.startswith("ann refused: ")
        if manifest:
            accepted += 1
            if signed:
                assert manifest.digest == original.digest
                assert all((update / file).read_bytes() == sound[file] for file in original.files)
            reader = open_update(update, expected)
            assert reader.modules == list(expected_shapes(expected.architecture, expected.package.kept_layers, lora))
            factors = [matrix for module in reader.modules for matrix in reader.read(module)]
            assert all(torch.linalg.vector_norm(matrix, dtype=torch.float64) <= MAX_NORM for matrix in factors)
        for file in {name, MANIFEST_NAME}:
            (update / file).write_bytes(sound[file])
    print(f"{codec}, {'signed' if signed else 'unsigned'}: {FUZZED // 4} mutations, {accepted} accepted")
    assert accepted < FUZZED // 4
