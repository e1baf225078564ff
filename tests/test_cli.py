"""The command line: each stage by hand, and what bad input gets."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from families import make_checkpoint
from federation import LORA, make_examples, make_update
from transformers import AutoModelForCausalLM

from hf_fedlarge.artifacts import AdapterManifest, CheckpointManifest, PackageManifest, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.errors import StoreError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.processor import computing_device, describe_device


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, a package, an adapter to start from, an update and data, all made for these tests."""
    path = tmp_path_factory.mktemp("cli")
    make_checkpoint(path / "checkpoint", layers=4, tokenizer=True)
    assert main(["shrink", str(path / "checkpoint"), "-o", str(path / "package"), "--keep-layers", "0,2,3"]) == 0
    start_adapter(path / "package", path / "start", LORA, seed=0)
    make_update(path / "update", path / "package", "ann", adapter=path / "start")
    make_examples(path / "data.jsonl")
    (path / "empty").mkdir()
    return path


def run(*words):
    return main([str(word) for word in words])


def test_the_chain_by_hand(home, tmp_path, capsys):
    training = ["--max_steps", "8", "--learning_rate", "1e-2", "--max_length", "64", "--disable_tqdm", "True"]
    training += ["--per_device_train_batch_size", "4", "--logging_strategy", "no"]
    for client in ("ann", "bob"):
        words = ["--package", home / "package", "--adapter", home / "start", "--data", home / "data.jsonl"]
        assert run("train", *words, "--output", tmp_path / client, "--client", client, *training) == 0
    words = ["--package", home / "package", "--adapter", home / "start", "-o", tmp_path / "adapter"]
    assert run("aggregate", tmp_path / "ann", tmp_path / "bob", *words) == 0
    assert run("merge", home / "checkpoint", tmp_path / "adapter", "-o", tmp_path / "merged") == 0
    losses = {}
    for name, words in {
        "base": [home / "checkpoint"],
        "package": [home / "package"],
        "package with adapter": [home / "package", "--adapter", tmp_path / "adapter"],
        "base with adapter": [home / "checkpoint", "--adapter", tmp_path / "adapter"],
        "merged": [tmp_path / "merged"],
    }.items():
        capsys.readouterr()
        assert run("evaluate", *words, "--data", home / "data.jsonl", "--max-length", 64) == 0
        said = capsys.readouterr()
        assert said.err.startswith("computing on the CPU, 1 thread\n")
        losses[name] = json.loads(said.out)["loss"]
    assert losses["package with adapter"] < losses["package"] - 0.3
    assert losses["merged"] < losses["base"] - 0.3
    assert losses["merged"] == pytest.approx(losses["base with adapter"], abs=0.02)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_who_joins_is_told_what_it_computes_on(home, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    words = ["--client", "ann", "--data", home / "data.jsonl", "--cache", tmp_path, "--patience", 0.01, "--poll", 0.01]
    assert run("join", tmp_path / "store", *words) == 2
    device, checked_in, waiting = capsys.readouterr().out.splitlines()
    assert device.endswith(" computing on the CPU, 1 thread")
    assert " ann checked in at " in checked_in
    assert waiting.endswith(
        " has no order yet: waiting for a server to begin there; is it the URL that the server has?"
    )


def test_a_gpu_is_said_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert describe_device(computing_device()) == "computing on cuda:1 (Card 1)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert describe_device(torch.device("cpu")) == "computing on the CPU, 8 threads"


@pytest.mark.parametrize("command", ["shrink", "merge"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(home, tmp_path, capsys, command):
    words = [home / "checkpoint", "-o", tmp_path / "output", "--dry-run"]
    if command == "merge":
        words.insert(1, home / "start")
    assert run(command, *words) == 0
    assert "MB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_only_what_is_ours(home, tmp_path, capsys):
    words = ["shrink", home / "checkpoint", "-o", tmp_path / "package", "--keep-layers"]
    assert run(*words, 3) == 0
    assert run(*words, 2) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(*words, 2, "--overwrite") == 0
    assert len(read_manifest(tmp_path / "package", PackageManifest).kept_layers) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run("shrink", home / "checkpoint", "-o", tmp_path / "mine", "--overwrite") == 2
    assert "was not made by hf-fedlarge" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("shrink {home}/nowhere -o {out}", "no such directory"),
        ("shrink {home}/empty -o {out}", "config.json"),
        ("shrink {home}/data.jsonl -o {out}", "is a file"),
        ("shrink {home}/checkpoint -o {out} --keep-layers 0", "out of range: the model has 4 layers"),
        ("shrink {home}/checkpoint -o {out} --keep-layers 5", "out of range: the model has 4 layers"),
        ("shrink {home}/checkpoint -o {out} --keep-layers 0.0", "keeps no valid share"),
        ("shrink {home}/checkpoint -o {out} --keep-layers two", "can't be read at 'two'"),
        ("shrink {home}/checkpoint -o {out} --keep-neurons 0", "--keep-neurons 0.0 is out of range"),
        ("shrink {home}/checkpoint -o {out} --heal-steps -1", "heal_steps: Input should be greater than"),
        ("shrink {home}/checkpoint -o {out} --surrogate-rank 0", "surrogate_rank: Input should be greater than"),
        ("shrink {home}/checkpoint -o {out} --keep-neurons nan", "keep_neurons: Input should be a finite number"),
        ("shrink {home}/checkpoint -o {home}/update", "exists already"),
        ("shrink {home}/checkpoint -o {home}/data.jsonl/x", "a parent of it is a file"),
        ("shrink {home}/package -o {out}", "is quantized already"),
        ("aggregate {home}/nowhere --package {home}/package -o {out}", "nowhere is not a directory"),
        ("aggregate {home}/package --package {home}/package -o {out}", "is of kind 'package'; expected an update"),
        ("aggregate {home}/update --package {home}/package -o {out}", "it started from the adapter"),
        ("aggregate {home}/update --package {home}/checkpoint -o {out}", "has no fedlarge.json"),
        ("aggregate {home}/update --package {home}/package -o {out} --aggregator mean", "Input should be 'exact', "),
        (
            "aggregate {home}/update --package {home}/package -o {out} --codec zip",
            "The codec 'zip' of share",
        ),
        ("aggregate {home}/update --package {home}/package -o {out} --codec int8", "The codec int8 needs --adapter"),
        ("merge {home}/checkpoint {home}/update -o {out}", "is of kind 'update'; expected an adapter"),
        ("merge {home}/package {home}/start -o {out}", "is quantized already"),
        ("merge {home}/checkpoint {home}/start -o {home}/package", "exists already"),
        ("evaluate {home}/empty --data {home}/data.jsonl", "config.json"),
        ("evaluate {home}/checkpoint --data {home}/nowhere.jsonl", "nowhere.jsonl"),
        ("evaluate {home}/checkpoint --data {home}/checkpoint/config.json", "config.json"),
        ("evaluate {home}/checkpoint --data {home}/data.jsonl --max-length 1", "labelled token"),
        ("evaluate {home}/checkpoint --data {home}/data.jsonl --batch-size 0", "--batch-size is 0"),
        ("evaluate {home}/checkpoint --adapter {home}/package --data {home}/data.jsonl", "expected an adapter"),
        ("evaluate {home}/checkpoint --data {home}/data.jsonl --revision v1", "has no revision 'v1'"),
        ("evaluate {home}/package --data {home}/data.jsonl --revision v1", "is a package, which has no revision 'v1'"),
        ("generate {home}/empty --prompt x", "config.json"),
        ("generate {home}/checkpoint --prompts {home}/nowhere.jsonl", "no such file as "),
        ("generate {home}/checkpoint --prompts {home}/checkpoint/config.json", "config.json"),
        ("generate {home}/checkpoint --prompt x --max-new-tokens 0", "--max-new-tokens is 0; expected 1 or more"),
        ("generate {home}/checkpoint --prompt x --batch-size -1", "--batch-size is -1"),
        ("generate {home}/checkpoint --prompt x --adapter {home}/package", "expected an adapter"),
        ("generate {home}/package --prompt x --revision v1", "is a package, which has no revision 'v1'"),
        ("generate {home}/checkpoint --prompt x -o {home}/data.jsonl", "data.jsonl exists already"),
        ("generate {home}/checkpoint --prompt x -o {out}/x.jsonl", "is no directory; make it"),
        (
            "transfer {home}/checkpoint {home}/package {home}/start --data {home}/data.jsonl --json {out}/x/f.json",
            "/output/x/f.json can't be written: ",
        ),
        (
            "transfer {home}/checkpoint {home}/package {home}/start --data {home}/none.jsonl --json {home}",
            "can't be written: it is a directory; give a file in it",
        ),
        ("push {home}/checkpoint me/model", "fedlarge.json"),
        ("push {home}/package model", "names no owner"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(home, tmp_path, capsys, words, sentence):
    before = sorted(home.rglob("*"))
    assert run(*words.format(home=home, out=tmp_path / "output").split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"hf-fedlarge {words.split()[0]}: ")
    assert sentence in lines[-1]
    assert not list(tmp_path.iterdir())
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "changes", "sentence"),
    [
        ("shrink org/large -o {out} --heal-steps -1", {}, "heal_steps"),
        ("merge org/large {home}/nowhere -o {out}", {}, "nowhere"),
        ("evaluate org/large --adapter {home}/nowhere --data {home}/data.jsonl", {}, "nowhere"),
        ("generate org/large --adapter {home}/nowhere --prompt x", {}, "nowhere"),
        ("generate org/large --prompts {home}/nowhere.jsonl", {}, "nowhere"),
        ("generate org/large --prompt x -o {home}/data.jsonl", {}, "exists already"),
        ("transfer org/large {home}/nowhere {home}/start --data {home}/data.jsonl", {}, "nowhere"),
        ("transfer org/large {home}/package {home}/nowhere --data {home}/data.jsonl", {}, "nowhere"),
        ("serve {out}.yaml --store {out}", {"eval_data": None}, "has no eval_data"),
        ("serve {out}.yaml --store {out}", {"eval_data": "nowhere.jsonl"}, "no such file as nowhere.jsonl"),
        ("serve {out}.yaml --store {out}", {"training": {"hub_token": "x"}}, "can't be ordered of clients"),
        ("run {out}.yaml --budget lots", {"data": {"source": "stdlib"}}, "The budget 'lots' can't be read"),
        ("run {out}.yaml", {}, "has no data"),
        ("run {out}.yaml", {"data": {"source": "nowhere.jsonl"}}, "no such file as nowhere.jsonl"),
        (
            "run {out}.yaml",
            {"data": {"source": "stdlib", "clients": 2}, "eval_data": "nowhere.jsonl"},
            "no such file as nowhere.jsonl",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_fetched(home, tmp_path, capsys, monkeypatch, words, changes, sentence):
    def fetch(*arguments, **how):
        raise AssertionError("the model was fetched")

    monkeypatch.setattr("hf_fedlarge.hub.snapshot_download", fetch)
    federation = {"checkpoint": "org/large", "eval_data": str(home / "data.jsonl"), "clients": {"ann": 10}}
    (tmp_path / "output.yaml").write_text(yaml.safe_dump(federation | changes))
    assert run(*words.format(home=home, out=tmp_path / "output").split()) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("join", "Interrupted; the same command goes on where it was."),
        ("merge", "Interrupted."),
        ("train", "Interrupted; the same command goes on from a checkpoint, if any."),
    ],
)
def test_an_interrupted_command_says_so_in_a_line(home, tmp_path, capsys, monkeypatch, command, sentence):
    def interrupt(*arguments, **how):
        raise KeyboardInterrupt

    for place in ("trainers.join.join", "merge.merge", "trainers.client.train_client"):
        monkeypatch.setattr(f"hf_fedlarge.{place}", interrupt)
    words = {
        "join": [tmp_path, "--client", "ann", "--data", "x"],
        "merge": [home / "checkpoint", home / "start", "-o", tmp_path / "merged"],
        "train": ["--package", home / "package", "--data", "x", "--output", tmp_path / "u", "--client", "ann"],
    }
    assert run(command, *words[command]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"hf-fedlarge {command}: {sentence}"


@pytest.mark.parametrize("command", ["serve", "join"])
def test_lines_of_commands_that_take_days_begin_with_the_time(home, tmp_path, capsys, monkeypatch, command):
    def say(*arguments, **how):
        (how["report"] if "report" in how else arguments[3])("somebody checked in")
        raise StoreError("It is over.")

    monkeypatch.setattr("hf_fedlarge.serve.serve_federation", say)
    monkeypatch.setattr("hf_fedlarge.trainers.join.join", say)
    (tmp_path / "federation.yaml").write_text("{checkpoint: org/large, eval_data: x}")
    words = [tmp_path / "federation.yaml", "--store", tmp_path]
    assert run(command, *(words if command == "serve" else [tmp_path, "--client", "ann", "--data", "x"])) == 2
    *_, line = lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    assert line.endswith(" somebody checked in")


def test_a_model_of_another_base_is_refused(home, tmp_path, capsys):
    make_checkpoint(tmp_path / "other", layers=4, seed=1, tokenizer=True)
    assert run("merge", tmp_path / "other", home / "start", "-o", tmp_path / "merged") == 2
    assert re.search(r"[0-9a-f]{12}", capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()


def test_a_config_of_an_unknown_architecture_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "frobnicator"}')
    assert run("shrink", tmp_path, "-o", tmp_path / "package") == 2
    assert "unknown architecture 'frobnicator'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["train", "--help"], []])
def test_help_and_usage(words):
    result = subprocess.run(
        [sys.executable, "-m", "hf_fedlarge.cli", *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == (0 if words else 2)
    assert "usage: hf-fedlarge" in result.stdout + result.stderr


def test_manifests_tell_where_things_come_from(home, tmp_path):
    words = ["--package", home / "package", "--adapter", home / "start", "-o", tmp_path / "adapter"]
    assert run("aggregate", home / "update", *words) == 0
    assert run("merge", home / "checkpoint", tmp_path / "adapter", "-o", tmp_path / "merged") == 0
    package = read_manifest(home / "package", PackageManifest)
    adapter = read_manifest(tmp_path / "adapter", AdapterManifest)
    merged = read_manifest(tmp_path / "merged", CheckpointManifest)
    assert adapter.package == package.digest
    assert merged.adapter == adapter.digest
    assert merged.base == adapter.base == package.base
