"""The client program: the same update however it is started, honest figures, resuming, and bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from federation import LORA, TRAINING, make_examples, make_federation, make_update
from filelock import FileLock
from safetensors.torch import load_file
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from trl import SFTTrainer

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, attach_lora
from hf_fedlarge.artifacts import MANIFEST_NAME, AdapterManifest, UpdateManifest, read_manifest, sha256_of, verify_files
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import Codec
from hf_fedlarge.data import load_examples, training_columns
from hf_fedlarge.encoding import encode_example, warn_of_cut
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError, FedLargeError, OutputError
from hf_fedlarge.evaluation import evaluate
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.merge import merge
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.launch import check_training
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with `package`, `adapter`, `train.jsonl` and `held_out.jsonl`."""
    path = tmp_path_factory.mktemp("client")
    make_federation(path)
    start_adapter(path / "package", path / "adapter", LORA, seed=1)
    make_examples(path / "train.jsonl", count=16)
    make_examples(path / "held_out.jsonl", count=6, seed=1)
    return path


def train(home, output, arguments=None, **training):
    client = {
        "package": str(home / "package"),
        "adapter": str(home / "adapter"),
        "data": str(home / "train.jsonl"),
        "eval_data": str(home / "held_out.jsonl"),
        "output": str(output),
        "client": "ann",
    }
    config = StreamingLoraConfig(output_dir=str(output), **TRAINING | training)
    return train_client(ClientArguments(**client | (arguments or {})), config)


def command_line(home, target, **options):
    options = {
        "package": home / "package",
        "adapter": home / "adapter",
        "data": home / "train.jsonl",
        "eval_data": home / "held_out.jsonl",
        "output": target,
        "client": "ann",
        **TRAINING,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def launch(*command):
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def weights(update):
    return load_file(update / ADAPTER_WEIGHTS)


def test_training_lowers_the_held_out_loss_and_the_update_says_what_was_done(home, tmp_path):
    manifest = train(home, tmp_path / "update", max_steps=12)
    assert manifest == read_manifest(tmp_path / "update", UpdateManifest)
    verify_files(tmp_path / "update", manifest)
    assert (manifest.client, manifest.round, manifest.examples) == ("ann", 1, 16)
    assert manifest.adapter == read_manifest(home / "adapter", AdapterManifest).digest
    assert manifest.loss_after < manifest.loss_before - 0.5
    tokenizer = load_tokenizer(home / "package")
    rows = [encode_example(row, tokenizer, 64) for row in load_examples(str(home / "train.jsonl"))]
    assert manifest.tokens == 3 * sum(len(row["input_ids"]) for row in rows)  # 12 steps of 4 are 3 epochs of 16
    assert manifest.measured["seconds"] > 0
    assert manifest.measured["peak_memory_bytes"] > 2**20
    assert {path.name for path in tmp_path.iterdir()} == {"update"}
    accepted = aggregate_updates([tmp_path / "update"], home / "package", tmp_path / "next", previous=home / "adapter")
    assert not accepted.refused


def test_accelerate_launch_the_command_and_a_call_give_the_same_bytes(home, tmp_path):
    digest = train(home, tmp_path / "call").digest
    assert main(["train", *command_line(home, tmp_path / "command")]) == 0
    assert read_manifest(tmp_path / "command", UpdateManifest).digest == digest
    client = os.path.join(os.path.dirname(__file__), "..", "trainers", "client.py")
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    accelerate += ["--mixed_precision=no", "--dynamo_backend=no"]
    result = launch(*accelerate, client, *command_line(home, tmp_path / "launched"))
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "launched", UpdateManifest).digest == digest


# Adam divides by the gradient's size, which turns rounding into a step; plain descent shows what was computed.
DESCENT = {"optim": "sgd", "learning_rate": 0.5, "bf16": False}


def assert_same_training(one, two):
    start, one, two = weights(one.parent / "start"), weights(one), weights(two)
    for name, tensor in one.items():
        assert torch.dist(tensor, two[name]) < 1e-4 * torch.dist(tensor, start[name])


def test_two_processes_make_the_update_of_one_on_the_same_global_batch(home, tmp_path):
    (tmp_path / "start").symlink_to(home / "adapter")
    words = command_line(home, tmp_path / "two", **DESCENT, per_device_train_batch_size=2)
    # `accelerate launch` starts several processes on CPUs by MPI only; torchrun sets up the same group over gloo.
    result = launch("torch.distributed.run", "--nproc-per-node=2", "-m", "hf_fedlarge.trainers.client", *words)
    assert result.returncode == 0, result.stderr
    train(home, tmp_path / "one", **DESCENT)
    assert_same_training(tmp_path / "one", tmp_path / "two")
    one, two = (read_manifest(tmp_path / name, UpdateManifest) for name in ("one", "two"))
    assert one.tokens == two.tokens
    assert result.stdout.count(f"{tmp_path / 'two'}: ") == 1
    assert result.stdout.count("computing on ") == 1


def test_accumulation_is_one_larger_batch(home, tmp_path):
    (tmp_path / "start").symlink_to(home / "adapter")
    train(home, tmp_path / "one", **DESCENT)
    train(home, tmp_path / "four", **DESCENT, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_training(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize("form", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_accumulation_of_padding_free_batches_keeps_them_apart(home, tmp_path, monkeypatch, form):
    """Flattened into one row a step, sequences stay apart, and a matrix is dequantized as often as for one batch."""
    (tmp_path / "start").symlink_to(home / "adapter")
    train(home, tmp_path / "one", **DESCENT | form, per_device_train_batch_size=6)
    compute_loss, counts = StreamingLoraTrainer.compute_loss, []

    def watched(self, model, inputs, *args, **kwargs):
        before = model.engine.counters.dequantizations
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        loss.backward(retain_graph=True)
        matrices = sum(map(len, model.engine.linears))
        counts.append((model.engine.counters.dequantizations - before) / matrices)
        model.zero_grad()
        return loss

    monkeypatch.setattr(StreamingLoraTrainer, "compute_loss", watched)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    train(home, tmp_path / "three", **DESCENT, **form, **options)
    assert max(counts) <= 2
    assert_same_training(tmp_path / "one", tmp_path / "three")


def test_the_optimizer_s_state_can_be_of_8_bits(home, tmp_path):
    """bitsandbytes' AdamW keeps a byte a value, twice, for matrices of 4096 values and more."""
    model = load_package(home / "package")
    model = attach_lora(model, model.architecture, LORA.model_copy(update={"rank": 64}))
    config = StreamingLoraConfig(
        output_dir=str(tmp_path / "x"), optim="adamw_bnb_8bit", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    trainer = StreamingLoraTrainer(
        model,
        config,
        train_dataset=Dataset.from_list([{"text": "Just text."}] * 16),
        processing_class=load_tokenizer(home / "package"),
    )
    trainer.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [trainer.optimizer.state[parameter] for parameter in parameters if parameter.numel() >= 4096]
    assert states
    assert {state[name].dtype for state in states for name in ("state1", "state2")} == {torch.uint8}
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_saved_model_is_an_adapter_of_the_full_one_and_a_checkpoint_one_of_the_package(home, tmp_path):
    model = load_package(home / "package")
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"), **TRAINING | {"max_steps": 2, "save_steps": 1})
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA),
        config,
        train_dataset=Dataset.from_list([{"text": "Just text."}] * 4),
        processing_class=load_tokenizer(home / "package"),
    )
    trainer.train()
    trainer.save_model()

    def layers(directory):
        return {int(name.split(".")[4]) for name in weights(directory)}

    assert layers(tmp_path / "x" / "checkpoint-2") == {0, 1, 2}
    assert layers(tmp_path / "x") == {0, 2, 3}
    names = {path.name for path in (tmp_path / "x").iterdir() if path.is_file()}
    assert {name for name in names if not name.startswith(("tokenizer", "chat"))} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


def test_several_gpus_without_a_launcher_are_not_under_data_parallel(home, tmp_path):
    model = load_package(home / "package")
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"), per_device_train_batch_size=2)
    assert config.n_gpu <= 1
    config._n_gpu = 2  # what transformers counts there
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA),
        config,
        train_dataset=Dataset.from_list([{"text": "Just text."}]),
        processing_class=load_tokenizer(home / "package"),
    )
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2


def test_a_second_process_for_the_same_update_waits_for_the_first(home, tmp_path):
    """What a server that was killed left behind finishes; the one started again finds the update there."""
    train(home, tmp_path / "finished")
    held = threading.Event()

    def other():
        with FileLock(tmp_path / ".update.lock"):
            held.set()
            time.sleep(0.5)
            (tmp_path / "finished").rename(tmp_path / "update")

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    with pytest.raises(OutputError, match="exists already"):
        train(home, tmp_path / "update")
    thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {"update"}


class PowerCut(BaseException):
    pass


def cut_in_the_fourth_step(monkeypatch):
    """Returns the list of the steps that will have been begun."""
    step, calls = StreamingLoraTrainer.training_step, []

    def cut(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise PowerCut
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamingLoraTrainer, "training_step", cut)
    return calls


def test_interrupted_training_resumes_from_its_checkpoint_with_the_same_bytes(home, tmp_path, monkeypatch):
    whole = train(home, tmp_path / "whole", max_steps=6, save_steps=2)
    calls = cut_in_the_fourth_step(monkeypatch)
    with pytest.raises(PowerCut):
        train(home, tmp_path / "cut", max_steps=6, save_steps=2)
    assert not (tmp_path / "cut").exists()
    resumed = train(home, tmp_path / "cut", max_steps=6, save_steps=2)
    assert calls[4:] == [2, 3, 4, 5]
    assert resumed.digest == whole.digest


def test_with_another_memory_budget_training_goes_on_from_its_checkpoint(home, tmp_path, monkeypatch, caplog):
    calls = cut_in_the_fourth_step(monkeypatch)
    with pytest.raises(PowerCut):
        train(home, tmp_path / "cut", max_steps=6, save_steps=2, memory_budget="30GB")
    assert "budget" not in caplog.text
    train(home, tmp_path / "cut", max_steps=6, save_steps=2, memory_budget="40GB")
    assert calls[4:] == [2, 3, 4, 5]
    assert caplog.text.count("The memory budget is another") == 1


@pytest.mark.parametrize("state", [None, '{"epoch": 1.'])
def test_an_unfinished_checkpoint_is_removed_and_the_one_before_it_resumed(home, tmp_path, monkeypatch, state):
    """transformers writes `trainer_state.json` last: a power cut leaves it missing or cut short."""
    whole = train(home, tmp_path / "whole", max_steps=6, save_steps=2)
    save, step, steps = StreamingLoraTrainer._save_checkpoint, StreamingLoraTrainer.training_step, []

    def cut(self, *args):
        if self.state.global_step == 4:
            unfinished = tmp_path / ".cut.work" / "checkpoint-4"
            unfinished.mkdir()
            if state:
                (unfinished / "trainer_state.json").write_text(state)
            raise PowerCut
        save(self, *args)

    def watched(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamingLoraTrainer, "_save_checkpoint", cut)
    with pytest.raises(PowerCut):
        train(home, tmp_path / "cut", max_steps=6, save_steps=2)
    monkeypatch.undo()
    monkeypatch.setattr(StreamingLoraTrainer, "training_step", watched)
    assert train(home, tmp_path / "cut", max_steps=6, save_steps=2).digest == whole.digest
    assert steps == [2, 3, 4, 5]


def test_an_unreadable_note_of_what_was_trained_means_starting_over(home, tmp_path):
    work = tmp_path / ".update.work"
    (work / "checkpoint-2").mkdir(parents=True)
    (work / "client.json").write_text('{"client": {"pack')
    train(home, tmp_path / "update")
    assert {path.name for path in tmp_path.iterdir()} == {"update"}


def test_a_checkpoint_of_another_training_is_not_resumed(home, tmp_path, monkeypatch):
    expected = train(home, tmp_path / "expected", max_steps=3)
    monkeypatch.setattr(StreamingLoraTrainer, "_save_checkpoint", lambda *args: (_ for _ in ()).throw(PowerCut))
    with pytest.raises(PowerCut):
        train(home, tmp_path / "update", save_steps=2, learning_rate=1.0)
    monkeypatch.undo()
    assert train(home, tmp_path / "update", max_steps=3).digest == expected.digest


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_what_needs_logits_is_refused(home, tmp_path, name):
    model = load_package(home / "package")
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match=f"{name} needs logits"):
        StreamingLoraTrainer(attach_lora(model, model.architecture, LORA), config, **{name: print})


def test_training_on_rows_that_are_gone_is_not_resumed(home, tmp_path, monkeypatch):
    lines = (home / "train.jsonl").read_text().splitlines(keepends=True)
    data = {"data": str(tmp_path / "mine.jsonl")}
    (tmp_path / "mine.jsonl").write_text("".join(lines[:8]))
    expected = train(home, tmp_path / "expected", data, max_steps=4, save_steps=2)
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    cut_in_the_fourth_step(monkeypatch)
    with pytest.raises(PowerCut):
        train(home, tmp_path / "update", data, max_steps=4, save_steps=2)
    monkeypatch.undo()
    (tmp_path / "mine.jsonl").write_text("".join(lines[:8]))
    assert train(home, tmp_path / "update", data, max_steps=4, save_steps=2).digest == expected.digest


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 128},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 128},
        {"completion_only_loss": False},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
)
def test_arguments_of_sftconfig_work(home, tmp_path, options):
    manifest = train(home, tmp_path / "update", **options)
    assert manifest.loss_after < manifest.loss_before


@pytest.mark.parametrize("form", ["messages", "text", "strings"])
def test_every_form_of_data_trains(home, tmp_path, form):
    rows = {
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]},
        "text": {"text": "The rain in Spain stays mainly in the plain."},
        "strings": {"prompt": "The rain in Spain", "completion": " stays in the plain."},
    }
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(rows[form]) + "\n" for _ in range(8)))
    options = {"assistant_only_loss": True} if form == "messages" else {}
    manifest = train(home, tmp_path / "update", {"data": str(tmp_path / "data.jsonl"), "eval_data": None}, **options)
    assert manifest.loss_after < manifest.loss_before
    assert manifest.examples == 7  # one was held out


@pytest.mark.parametrize(("eval_examples", "trained"), [(0, 16), (1, 15), (64, 12)])
def test_no_more_is_held_out_than_is_evaluated(home, tmp_path, eval_examples, trained):
    how = {"eval_data": None, "held_out": 0.25, "eval_examples": eval_examples}
    manifest = train(home, tmp_path / "update", how, max_steps=1)
    assert manifest.examples == trained
    assert (manifest.loss_after is None) == (eval_examples == 0)


@pytest.mark.parametrize("form", ["plain", "packed", "split", "by trl"])
def test_examples_that_lose_all_labels_are_said_and_not_counted(home, tmp_path, caplog, form):
    options = {
        "plain": {},
        "packed": {"packing": True},
        "split": {"packing": True, "packing_strategy": "bfd_split"},
        "by trl": {"dataset_num_proc": 1},
    }[form]
    rows = [{"prompt": "x" * 200, "completion": "never trained"}] * 6 + [{"prompt": "hi", "completion": "there"}] * 2
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"data": str(tmp_path / "data.jsonl"), "eval_examples": 0}
    manifest = train(home, tmp_path / "update", how, max_steps=1, **options)
    said = "6 of 8 examples (train) have no labelled token within max_length (64) tokens and are left out."
    assert (manifest.examples, said in caplog.text) == ((8, False) if form == "split" else (2, True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"dataset_num_proc": 1},
        {"dataset_num_proc": 1, "packing": True},
        {"assistant_only_loss": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_how_many_examples_are_cut_is_said_once(home, tmp_path, caplog, options):
    tokenizer, model = load_tokenizer(home / "package"), load_package(home / "package")
    rows = [{"messages": LONG}] * 3 + [{"messages": [{**message, "content": "hi"} for message in LONG]}] * 2
    warn_of_cut.cache_clear()
    adapted = attach_lora(model, model.architecture, LORA)
    for _ in range(2):
        config = StreamingLoraConfig(output_dir=str(tmp_path / "x"), max_length=100, disable_tqdm=True, **options)
        trainer = StreamingLoraTrainer(
            adapted, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        assert list(trainer.example_lengths) == [len(encode_example(row, tokenizer, None)["input_ids"]) for row in rows]
    said = "3 of 5 examples (train) are longer than max_length (100) tokens and were cut."
    assert caplog.text.count(said) == (options.get("packing_strategy") != "bfd_split")


def test_held_out_examples_are_evaluated_while_training_where_it_is_asked_for(home, tmp_path, capsys):
    how = {"eval_strategy": "steps", "eval_steps": 1}
    manifest = train(home, tmp_path / "update", max_steps=2, logging_strategy="steps", **how)
    losses = re.findall(r"'eval_loss': '([0-9.]+)'", capsys.readouterr().out)
    assert len(losses) == 2
    assert float(losses[1]) == pytest.approx(manifest.loss_after, abs=1e-3)
    with pytest.raises(ConfigError, match=r"--eval_strategy steps has no held-out examples .* give --eval_data, or"):
        train(home, tmp_path / "other", {"eval_data": None, "eval_examples": 0}, **how)


def test_the_best_checkpoint_may_be_the_last(home, tmp_path):
    last = train(home, tmp_path / "last", max_steps=2)
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    best = train(home, tmp_path / "best", max_steps=2, **how)
    assert best.loss_after == last.loss_after


class Board(TensorBoardCallback):
    """Without tensorboard: a line in place of its file."""

    def __init__(self):
        self.logging_dir, self.tb_writer = os.getenv("TENSORBOARD_LOGGING_DIR"), None

    def on_train_begin(self, *args, **kwargs):
        os.makedirs(self.logging_dir)

    def on_log(self, args, state, control, logs=None, **kwargs):
        with open(os.path.join(self.logging_dir, "events"), "a") as file:
            file.write(f"{logs}\n")


def test_what_tensorboard_logs_stays_beside_the_update(home, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    how = {"max_steps": 1, "report_to": "tensorboard", "logging_strategy": "steps"}
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(home, tmp_path / "update", **how)
    assert {path.name for path in tmp_path.iterdir()} == {"update", "update.logs"}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    train(home, tmp_path / "other", **how)
    assert {path.name for path in tmp_path.iterdir()} == {"update", "update.logs", "other", "mine"}


def test_a_client_without_an_adapter_starts_its_own(home, tmp_path):
    manifest = train(home, tmp_path / "update", {"adapter": None, "lora_rank": 2, "lora_targets": ["q_proj"]})
    assert manifest.adapter is None
    assert {tuple(t.shape) for n, t in weights(tmp_path / "update").items() if "lora_A" in n} == {(2, 64)}
    assert all("q_proj" in name for name in weights(tmp_path / "update"))


@pytest.mark.parametrize(
    ("options", "apart", "expected"),
    [
        ({}, True, [6, 31, 31]),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, True, [6, 31, 31]),
        ({"neftune_noise_alpha": 5.0}, True, [31] * 3),
        ({}, False, [31] * 3),
        ({"padding_free": True, "max_length": None}, True, [6, 31, 31]),
        ({"padding_free": True, "max_length": None}, False, [6 + 31 + 31]),
        ({"packing": True}, True, [17, 31, 31, 31]),  # rows of 37, 37 and 36 tokens
        ({"packing": True, "packing_strategy": "wrapped"}, True, [30, 40, 40]),
    ],
)
def test_a_budget_is_measured_behind_tokenizing_for_the_largest_batch(
    home, tmp_path, monkeypatch, options, apart, expected
):
    model = load_package(home / "package")
    monkeypatch.setattr(model.engine, "takes_apart", apart)
    asked = []
    monkeypatch.setattr(model.engine, "set_memory_budget", lambda *args: asked.append(args))
    data = Dataset.from_list([{"text": "a" * (30 if index in (3, 9) else 5)} for index in range(10)])
    options = {"per_device_train_batch_size": 3, "max_length": 40, "disable_tqdm": True} | options
    StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA),
        StreamingLoraConfig(output_dir=str(tmp_path / "x"), memory_budget="3GB", **options),
        train_dataset=data,
        processing_class=load_tokenizer(home / "package"),
    )
    assert [budget for budget, _ in asked] == [3 * 10**9]
    assert sorted(asked[0][1]) == expected


def test_a_batch_too_large_for_the_budget_is_refused_before_the_first_step(home, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.engine.used_bytes", lambda device: 0)
    model = load_package(home / "package")
    adapted = attach_lora(model, model.architecture, LORA)
    moments = 12 * sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    rows = [{"text": "short"}] * 20 + [{"text": "long" * 100}]
    for data in (rows[:20], rows):
        config = StreamingLoraConfig(
            output_dir=str(tmp_path / "x"), memory_budget=str(moments + 600_000), **TRAINING | {"max_length": 512}
        )
        model.engine.start_over()
        trainer = StreamingLoraTrainer(
            adapted, config, train_dataset=Dataset.from_list(data), processing_class=load_tokenizer(home / "package")
        )
        if data == rows:
            with pytest.raises(ConfigError, match="raise --memory_budget"):
                trainer.train()
            assert trainer.state.global_step == 0
        else:
            trainer.train()


def test_a_stream_of_examples_is_not_read_before_training(home, tmp_path):
    read = []

    def examples():
        for number in range(1000):
            read.append(number)
            yield {"text": f"line {number}"}

    model = load_package(home / "package")
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA),
        StreamingLoraConfig(output_dir=str(tmp_path / "x"), memory_budget="30GB", **TRAINING | {"max_steps": 1}),
        train_dataset=IterableDataset.from_generator(examples, features=Features({"text": Value("string")})),
        processing_class=load_tokenizer(home / "package"),
    )
    assert len(read) < 10
    trainer.train()
    assert trainer.state.global_step == 1


LONG = [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": "b" * 80}]


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True}, {"shuffle_dataset": True}, {"max_length": None}, {"completion_only_loss": False}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": LONG},
        {"prompt": LONG[:1], "completion": LONG[1:]},
        {"prompt": "What? ", "completion": "That."},
        {"text": "Just text."},
    ],
    ids=["messages", "chat", "plain", "text"],
)
def test_examples_become_the_tokens_that_trl_makes_of_them(home, tmp_path, row, options):
    tokenizer, model = load_tokenizer(home / "package"), load_package(home / "package")
    # The second has no labelled token left within 100 where its prompt is that long.
    long = {
        key: value * 40 if isinstance(value, str) else [value[0] | {"content": "c" * 200}, *value[1:]]
        for key, value in row.items()
    }
    data = Dataset.from_list([row, long, row])
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"), disable_tqdm=True, **{"max_length": 100} | options)
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA), config, train_dataset=data, processing_class=tokenizer
    )
    theirs = SFTTrainer._prepare_dataset(trainer, data, tokenizer, config, config.packing, None, "train")
    columns = ["input_ids", "labels"]
    assert trainer.train_dataset.select_columns(columns).to_list() == theirs.select_columns(columns).to_list()


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), None])
@pytest.mark.parametrize("assistant_only", [False, True])
def test_tools_are_rendered_wherever_a_chat_becomes_tokens(home, tmp_path, assistant_only, tools):
    tokenizer, model = load_tokenizer(home / "package"), load_package(home / "package")
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ m.tool_calls | tojson }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    config = StreamingLoraConfig(output_dir=str(tmp_path / "x"), disable_tqdm=True, assistant_only_loss=assistant_only)
    calls = [{"function": {"name": "weather", "arguments": {name: "x"}}} for name in ("city", "day")]
    rows = [{"messages": [LONG[0], LONG[1] | {"tool_calls": [call]}], "tools": tools} for call in calls]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = training_columns(load_examples(str(tmp_path / "data.jsonl")))
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA), config, train_dataset=data, processing_class=tokenizer
    )
    theirs = SFTTrainer._prepare_dataset(trainer, data, tokenizer, config, False, None, "train")
    for number, row in enumerate(data):
        ours = encode_example(row, tokenizer, 1024, assistant_only)
        text = tokenizer.decode(ours["input_ids"])
        assert ("parameters" in text) == bool(tools)
        assert ("city" in text, "day" in text) == (number == 0, number == 1)
        for column in ("input_ids", "labels"):
            assert ours[column] == theirs[number][column] == trainer.train_dataset[number][column]


def test_a_template_that_renders_the_prompt_alone_as_more_than_the_whole_leaves_nothing_counted(home):
    tokenizer = load_tokenizer(home / "package")
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}Answer: {% endif %}"
    found = encode_example({"prompt": LONG[:1], "completion": LONG[1:]}, tokenizer, 100)
    assert tokenizer.decode(found["input_ids"]) == LONG[0]["content"][:100]
    assert set(found["labels"]) == {-100}


def test_a_template_that_can_t_take_a_tool_s_arguments_is_one_sentence(home):
    tokenizer = load_tokenizer(home / "package")
    tokenizer.chat_template = "{{ 'x' + messages[0].role.upper }}"
    with pytest.raises(DataError, match=r"chat template can't be used for an example: can only concatenate str"):
        encode_example({"messages": LONG}, tokenizer, 100)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_evaluation_counts_the_tokens_that_trl_trains_on(home, tmp_path, assistant_only):
    tokenizer, model = load_tokenizer(home / "package"), load_package(home / "package")
    config = StreamingLoraConfig(
        output_dir=str(tmp_path / "x"), max_length=100, disable_tqdm=True, assistant_only_loss=assistant_only
    )
    data = Dataset.from_list([{"messages": LONG}])
    trainer = StreamingLoraTrainer(
        attach_lora(model, model.architecture, LORA), config, train_dataset=data, processing_class=tokenizer
    )
    ours = encode_example({"messages": LONG}, tokenizer, 100, assistant_only)
    theirs = SFTTrainer._prepare_dataset(trainer, data, tokenizer, config, False, None, "train")[0]
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template; take an instruction-tuned model"),
        ("{% generation %}{{ raise_exception('no such role') }}{% endgeneration %}", "can't be used for an example"),
    ],
)
def test_chats_without_a_template_that_takes_them_are_one_sentence(home, template, sentence, assistant_only):
    tokenizer = load_tokenizer(home / "package")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=sentence):
        encode_example({"messages": LONG}, tokenizer, 100, assistant_only)
    if not assistant_only:
        with pytest.raises(DataError, match=sentence):
            encode_example({"prompt": LONG[:1], "completion": LONG[1:]}, tokenizer, 100)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"package": "nowhere"}, "nowhere is not a directory; expected a package"),
        ({"package": "{home}/adapter"}, "is of kind 'adapter'; expected a package"),
        ({"adapter": "{home}/package"}, "is of kind 'package'; expected an adapter"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": "{home}/package/config.json"}, "config.json"),
        ({"output": "{home}/adapter"}, "exists already"),
        ({"client": "../x"}, "client: String should match pattern"),
        ({"max_length": 4}, "no example|fully masked|DataError|labelled"),
        ({"max_length": 4, "memory_budget": "30GB"}, "has no example with a labelled token within 4 tokens"),
        ({"loss_type": "dft"}, "--loss_type dft can't be used"),
        ({"memory_budget": "1MB"}, r"train: The memory budget of 1 MB is too small"),
        ({"fp16": "True", "bf16": "False"}, "--fp16 True can't be used"),
        ({"output_dir": "mine"}, "--output_dir mine can't be used; leave it out: .* --output names"),
        ({"resume_from_checkpoint": "mine"}, "--resume_from_checkpoint can't be used; leave it out: .* same command"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(home, tmp_path, capsys, options, sentence):
    options = {name: str(value).format(home=home) for name, value in options.items()}
    before = sorted(path.name for path in home.iterdir())
    assert main(["train", *command_line(home, tmp_path / "update", **options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-fedlarge train: ")
    assert re.search(sentence, error), error
    assert not (tmp_path / "update").exists()
    assert sorted(path.name for path in home.iterdir()) == before


def test_a_file_in_place_of_a_directory_is_said_before_the_package_is_loaded(home, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("hf_fedlarge.package.load_package", lambda *args, **kwargs: pytest.fail("loaded"))
    assert main(["train", *command_line(home, tmp_path / "file" / "update")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"hf-fedlarge train: \S+/file/\S+ could not be written: a parent of it is a file, .*\.", error)


def test_a_disk_that_fills_up_while_training_is_said_in_a_sentence(home, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nframe #0")

    monkeypatch.setattr(StreamingLoraTrainer, "_save_optimizer_and_scheduler", full)
    assert main(["train", *command_line(home, tmp_path / "update", save_steps=2)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"checkpoint in \S+\.update\.work could not be written: .* vs 534; look for free space", error)


@pytest.mark.parametrize("where", ["__init__", "training_step"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:125] . DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
)
def test_memory_that_is_full_is_said_in_a_sentence(home, tmp_path, monkeypatch, where, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(StreamingLoraTrainer, where, full)
    with pytest.raises(FedLargeError) as raised:
        train(home, tmp_path / "update", bf16=False)
    assert re.fullmatch(
        r"Training ran out of memory with \d+ MB in use \(cpu\): give --memory-budget, or a smaller one, or lower "
        r"--max_length or the batch\.",
        str(raised.value),
    )
    assert not (tmp_path / "update").exists()


def test_a_federations_training_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_training(TRAINING | {"learning_rate": "1e-4", "packing": True, "lr_scheduler_kwargs": {"power": 2}})
    wrong = {
        "no_such_thing": (1, "no_such_thing found, expected those of trl's SFTConfig"),
        "max_step": (1, "max_step found, expected max_steps; correct or remove it."),
        "output_dir": ("x", "output_dir"),
        "resume_from_checkpoint": ("x", "resume_from_checkpoint"),
        "max_length": (None, "max_length is null"),
        "max_steps": ("many", "--max_steps.*invalid int value: 'many'"),
        "packing": ("perhaps", "--packing"),
        "optim": ("none", "--optim.*none"),
        "fp16": (True, "--fp16 True can't be used"),
    }
    for name, (value, sentence) in wrong.items():
        with pytest.raises(ConfigError, match=sentence):
            check_training({name: value})
    assert not list(tmp_path.iterdir())


def test_a_client_needs_nothing_that_is_the_server_s_alone(home, tmp_path):
    train(home, tmp_path / "first")
    make_update(tmp_path / "second", home / "package", "bob", seed=5, adapter=home / "adapter")
    updates = [tmp_path / "first", tmp_path / "second"]
    aggregate_updates(updates, home / "package", tmp_path / "carrying", previous=home / "adapter")
    assert (tmp_path / "carrying" / "carry.safetensors").exists()
    how = {"adapter": str(tmp_path / "carrying"), "round": 2}
    digest = train(home, tmp_path / "with", how).digest
    (tmp_path / "carrying" / "carry.safetensors").unlink()
    assert train(home, tmp_path / "without", how).digest == digest
    with pytest.raises(ArtifactError, match=r"lacks carry.safetensors"):
        merge(home / "checkpoint", tmp_path / "carrying", tmp_path / "merged")


# Two steps of plain descent on the very same batch, unclipped: what FedProx adds is known by hand.
TWO_STEPS = DESCENT | {"max_steps": 2, "max_grad_norm": 0.0, "per_device_train_batch_size": 16}


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}])
def test_the_proximal_term_is_its_closed_form(home, tmp_path, options):
    """The first step is FedAvg's, w₁; the second one gains −η μ (w₁ − w₀) (arXiv 1812.06127)."""
    one = {name: {"max_steps": steps} for name, steps in (("first", 1), ("plain", 2))}
    for name, steps in one.items():
        train(home, tmp_path / name, **TWO_STEPS | options | steps)
    train(home, tmp_path / "proximal", {"proximal": 0.3}, **TWO_STEPS | options)
    train(home, tmp_path / "near", {"proximal": 0.3}, **TWO_STEPS | options | {"max_steps": 1})
    start, first, plain, proximal, near = map(
        weights, (home / "adapter", *(tmp_path / name for name in ("first", "plain", "proximal", "near")))
    )
    for name, w_1 in first.items():
        assert torch.equal(near[name], w_1)
        pull = -DESCENT["learning_rate"] * 0.3 * (w_1 - start[name])
        assert pull.any() == ("lora_B" in name)  # A has no gradient as long as B is zero
        torch.testing.assert_close(proximal[name] - plain[name], pull, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["proximal", "scaffold"])
def test_a_resumed_client_goes_on_with_what_draws_and_corrects_its_steps(home, tmp_path, monkeypatch, how):
    options, arguments = {"max_steps": 4, "save_steps": 2}, {"proximal": 5.0}
    if how == "scaffold":
        adapter = tmp_path / "adapter"
        start_adapter(home / "package", adapter, LORA, seed=1, aggregator="fedavg", scaffold=True)
        arguments = {"adapter": str(adapter), "state": str(tmp_path / "state")}
    whole = train(home, tmp_path / "whole", arguments, **options)
    calls = cut_in_the_fourth_step(monkeypatch)
    with pytest.raises(PowerCut):
        train(home, tmp_path / "cut", arguments, **options)
    assert train(home, tmp_path / "cut", arguments, **options).digest == whole.digest
    assert calls[4:] == [2, 3]


def test_a_negative_proximal_term_is_refused(home, tmp_path, capsys):
    assert main(["train", *command_line(home, tmp_path / "update", proximal=-0.1)]) == 2
    assert "--proximal -0.1 is out of range" in capsys.readouterr().err


def test_what_a_codec_lost_goes_into_the_next_update_and_a_kill_changes_nothing(home, tmp_path):
    """The state is written before the update: a kill in between leaves a state whose round is done again."""
    state, adapter = tmp_path / "state", home / "adapter"
    for number in (1, 2, 3):
        output = tmp_path / f"update-{number}"
        how = {"codec": "int8", "adapter": str(adapter), "state": str(state), "round": number, "eval_examples": 0}
        digest = train(home, output, how, max_steps=2).digest
        kept = {path.name: sha256_of(path) for path in state.iterdir()}
        assert sorted(kept) == [f"lost-{done:07d}.safetensors" for done in (1, 2, 3)[max(0, number - 2) : number]]
        if number > 1:
            shutil.rmtree(output)
            assert train(home, output, how, max_steps=2).digest == digest
            assert {path.name: sha256_of(path) for path in state.iterdir()} == kept
        collected = aggregate_updates(
            [output], home / "package", tmp_path / f"next-{number}", previous=adapter, codec=Codec(name="int8")
        )
        assert not collected.refused
        if number < 3:
            adapter = tmp_path / f"next-{number}"
    assert train(home, tmp_path / "forgetful", how | {"state": None}, max_steps=2).digest != digest
    start_adapter(home / "package", tmp_path / "other", LORA.model_copy(update={"rank": 2}), seed=1)
    with pytest.raises(ArtifactError, match="give each federation a --state of its own"):
        train(home, tmp_path / "x", how | {"adapter": str(tmp_path / "other")})


def federate(home, path, **encoding):
    """Held-out loss on the package after two rounds of two clients, and the bytes of an update."""
    codec, adapter = Codec(name=encoding.get("codec", "fp32")), home / "adapter"
    for number in (1, 2):
        updates = [path / f"{client}-{number}" for client in ("ann", "bob")]
        for seed, update in enumerate(updates):
            client = update.name.partition("-")[0]
            how = {"client": client, "round": number, "adapter": str(adapter), "state": str(path / f"of-{client}")}
            train(home, update, encoding | how | {"eval_examples": 0}, seed=seed, max_steps=6)
        following = path / f"adapter-{number}"
        assert not aggregate_updates(updates, home / "package", following, previous=adapter, codec=codec).refused
        adapter = following
    held_out = load_examples(str(home / "held_out.jsonl"))
    sent = sum(file.stat().st_size for file in updates[0].iterdir() if file.name != MANIFEST_NAME)
    return evaluate(home / "package", held_out, adapter=adapter).loss, sent


def test_a_federation_in_int8_gains_what_one_in_fp32_does_for_a_quarter_of_the_bytes(home, tmp_path):
    start = evaluate(home / "package", load_examples(str(home / "held_out.jsonl"))).loss
    plain, bytes_plain = federate(home, tmp_path / "fp32")
    int8, bytes_int8 = federate(home, tmp_path / "int8", codec="int8")
    assert plain < start - 0.2
    assert start - int8 > 0.98 * (start - plain)
    assert bytes_plain > 4 * bytes_int8


def test_a_codec_that_can_t_be_used_is_said_before_anything_is_loaded(home, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.package.load_package", lambda *args, **kwargs: pytest.fail("loaded"))
    for wrong, sentence in (
        ({"codec": "zip"}, "The codec 'zip' of share 0.05 is wrong: name: Input should be 'fp32'"),
        ({"codec": "topk", "topk_share": 0.0}, "The codec 'topk' of share 0.0 is wrong: topk_share"),
        ({"codec": "int8", "adapter": None}, "--codec int8 encodes what changed since --adapter"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            train(home, tmp_path / "update", wrong)
