"""A federation from file to merged checkpoint: what it makes, and that a kill anywhere changes nothing."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import killed
import pytest
import torch
import yaml
from families import MISTRAL, make_checkpoint
from federation import make_update
from transformers import AutoModelForCausalLM

from hf_fedlarge.adapters import attach_lora, get_factors, read_factors, set_factors
from hf_fedlarge.artifacts import (
    MANIFEST_NAME,
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    read_manifest,
    sha256_of,
    verify_files,
)
from hf_fedlarge.cards import render_card
from hf_fedlarge.cli import main
from hf_fedlarge.config import LoraSettings, TierSettings, load_federation
from hf_fedlarge.data import from_rows, load_examples, training_columns, write_jsonl
from hf_fedlarge.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    DataError,
    FedLargeError,
    OutputError,
    UpdateRefusedError,
)
from hf_fedlarge.evaluation import Evaluation
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import SIGNATURE_NAME
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.plan import CheckIn, sample_cohort
from hf_fedlarge.rounds import run_federation
from hf_fedlarge.traffic import changed_bytes
from hf_fedlarge.trainers.launch import LAUNCHERS, ClientFailedError
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer
from hf_fedlarge.update import MAX_SMALL_BYTES

IN_PROCESS = LAUNCHERS["inprocess"]()
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, examples of four teams, and a federation of them."""
    path = tmp_path_factory.mktemp("federation")
    make_checkpoint(path / "checkpoint", layers=4, tokenizer=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {COLOURS[index % 4]} {index}."}],
            "completion": [{"role": "assistant", "content": COLOURS[index % 4] * 2}],
            "team": f"team-{COLOURS[index % 4]}",
        }
        for index in range(48)
    ]
    write_jsonl(from_rows(rows), path / "data.jsonl")
    federation = {
        "checkpoint": str(path / "checkpoint"),
        "data": {"source": str(path / "data.jsonl"), "split": "column", "column": "team", "held_out": 0.2},
        "keep_layers": 3,
        "lora": {"rank": 4, "alpha": 8},
        "rounds": 2,
        "cohort": 3,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_length": 64,
            "disable_tqdm": True,
            "logging_strategy": "no",
        },
        "sample_prompt": "Say red.",
    }
    (path / "federation.yaml").write_text(yaml.safe_dump(federation))
    return path


def config_of(home, **changes):
    return load_federation(home / "federation.yaml").model_copy(update=changes)


def run(home, output, train=IN_PROCESS, **changes):
    return run_federation(config_of(home, **changes), output, train)


def fingerprint(output):
    """What must not depend on kills, launchers or time: every adapter, and every file of the merged checkpoint."""
    adapters = [
        read_manifest(path / "adapter", AdapterManifest).digest
        for path in sorted((output / "rounds").iterdir())
        if not path.name.startswith(".")
    ]
    return adapters, {path.name: sha256_of(path) for path in (output / "merged").iterdir()}


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An uninterrupted run's directory and summary."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, run(home, output)


def test_a_run_ends_with_a_better_full_model_and_honest_figures(home, whole):
    output, summary = whole
    assert summary == json.loads((output / "summary.json").read_text())
    loss = summary["loss"]
    assert loss["merged"] < loss["base"] - 0.1
    assert len(summary["rounds"]) == 2
    first, second = summary["rounds"]
    assert second["loss_full"] == pytest.approx(loss["merged"], abs=0.02)
    assert second["loss_small"] < loss["package"]
    assert first["client_loss"]["clients"] == second["client_loss"]["clients"] == 3
    assert second["client_loss"]["before"] < first["client_loss"]["before"]

    package = read_manifest(output / "package", PackageManifest).total_bytes
    adapters = [output / "rounds" / number / "adapter" for number in ("0000", "0001")]
    assert first["bytes_down"] == 3 * (package + changed_bytes(adapters[0], None))
    newcomers = {c["client"] for c in second["clients"]} - {c["client"] for c in first["clients"]}
    old = 3 - len(newcomers)
    whole_adapter, change = changed_bytes(adapters[1], None), changed_bytes(adapters[1], adapters[0])
    assert second["bytes_down"] == len(newcomers) * (package + whole_adapter) + old * change
    assert change < whole_adapter  # the carry and what hasn't changed stay
    assert summary["bytes_down"] == first["bytes_down"] + second["bytes_down"]
    assert summary["bytes_up"] > 6 * read_manifest(adapters[0], AdapterManifest).total_bytes * 0.9
    assert sum(entry["weight"] for entry in first["clients"]) == pytest.approx(1)
    assert summary["peak_memory_bytes"] > 2**20
    assert isinstance(summary["sample"]["before"], str)

    merged = read_manifest(output / "merged", CheckpointManifest)
    verify_files(output / "merged", merged)
    model = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert model.config.num_hidden_layers == 4
    assert model.dtype == torch.bfloat16


def test_by_default_every_layer_stays_with_some_of_its_neurons(home, tmp_path):
    summary = run(home, tmp_path / "run", keep_layers=None, rounds=1)
    assert summary["loss"]["merged"] < summary["loss"]["base"]
    package = load_package(tmp_path / "run" / "package")
    assert package.package.kept_layers == [0, 1, 2, 3]
    adapter = read_factors(tmp_path / "run" / "rounds" / "0001" / "adapter")
    for block, kept in package.architecture.neurons.items():
        missing = sorted(set(range(128)) - set(kept.tolist()))
        assert len(missing) == 64
        # In the full model's shapes, with nothing for neurons that no client has seen.
        for path, part in (("gate_proj", "B_OR"), ("up_proj", "B_OR"), ("down_proj", "A_RI")):
            factor = getattr(adapter[f"model.layers.{block}.mlp.{path}"], part)
            factor = factor.T if part == "A_RI" else factor
            assert len(factor) == 128
            assert factor[missing].abs().max() < 1e-12 * factor.abs().max()  # rounding of the truncation
            assert factor[kept].any()


def test_clients_of_little_memory_get_a_smaller_package_and_rank_in_the_same_round(home, tmp_path):
    data = config_of(home).data.model_copy(update={"memory": ["8GB", "400MB"]})
    tiers = {"phone": TierSettings(memory="300MB", keep_layers=2, rank=2)}
    summary = run(home, tmp_path / "run", data=data, tiers=tiers, cohort=None, rounds=2)
    assert summary["loss"]["merged"] < summary["loss"]["base"] - 0.1
    small = read_manifest(tmp_path / "run" / "packages" / "phone", PackageManifest)
    assert len(small.kept_layers) == 2
    first = summary["rounds"][0]
    assert len(first["clients"]) == 4
    down = sorted(entry["down"] for entry in first["bytes_by_client"].values())
    assert down[1] < down[2]
    tiers = {client: entry["down"] > down[1] for client, entry in first["bytes_by_client"].items()}
    asked = Journal(tmp_path / "run" / "journal.jsonl").find("asked", round=1)
    assert {entry["client"]: entry["tier"] == 0 for entry in asked} == tiers


def test_a_round_that_could_overstep_the_budget_is_not_begun(home, whole, tmp_path):
    output, (first, _) = tmp_path / "run", whole[1]["rounds"]
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "rounds" / "0002")
    journal = (output / "journal.jsonl").read_text().splitlines(keepends=True)
    (output / "journal.jsonl").write_text("".join(line for line in journal if json.loads(line)["round"] == 1))
    spent = first["bytes_down"] + first["bytes_up"]
    with pytest.raises(BudgetError, match=rf"Round 2 with 3 clients needs \d+ bytes, but {spent} of the budget's"):
        run(home, output, budget=str(spent + 3 * 2 * MAX_SMALL_BYTES))
    assert {entry["round"] for entry in Journal(output / "journal.jsonl").find("asked")} == {1}
    run(home, output, budget="1GB")
    assert fingerprint(output) == fingerprint(whole[0])


def test_a_run_in_another_codec_sends_less_and_learns_as_much(home, whole, tmp_path):
    [one] = run(home, tmp_path / "run", codec="int8", rounds=1)["rounds"]
    plain = whole[1]["rounds"][0]
    assert one["bytes_up"] < 0.5 * plain["bytes_up"]
    base = whole[1]["loss"]["base"]
    assert base - one["loss_full"] > 0.9 * (base - plain["loss_full"])
    assert list((tmp_path / "run" / "clients").rglob("lost-*.safetensors"))


def test_a_run_with_scaffold_corrects_from_the_second_round_on(home, tmp_path):
    """By what the first round's clients report; a run without it goes the same way for a round."""
    adapters, sent = [], []
    for scaffold in (True, False):
        output = tmp_path / f"{scaffold}"
        rounds = run(home, output, aggregator="fedavg", cohort=None, scaffold=scaffold)["rounds"]
        sent.append(rounds[1]["bytes_up"])
        paths = [output / "rounds" / number / "adapter" / "adapter_model.safetensors" for number in ("0001", "0002")]
        adapters.append([sha256_of(path) for path in paths])
    assert adapters[0][0] == adapters[1][0]
    assert adapters[0][1] != adapters[1][1]
    assert 1.8 < sent[0] / sent[1] < 2
    kept = sorted((tmp_path / "True" / "clients" / "team-red" / "state").iterdir())
    assert [path.name for path in kept] == ["control-0000001.safetensors", "control-0000002.safetensors"]


def test_a_run_whose_clients_sign_makes_the_same_and_refuses_who_does_not(home, whole, tmp_path):
    def train(job):
        IN_PROCESS(job)
        if job.round == 2:
            (job.output / SIGNATURE_NAME).unlink()

    output = tmp_path / "run"
    [one] = run(home, output, keys="auto", rounds=1, train=train)["rounds"]
    assert fingerprint(output)[0] == fingerprint(whole[0])[0][:2]
    assert whole[1]["rounds"][0]["bytes_up"] < one["bytes_up"] < whole[1]["rounds"][0]["bytes_up"] + 3 * 1024
    secrets = sorted(output.glob("clients/*/key.pem"))
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600] * 4
    with pytest.raises(
        UpdateRefusedError, match=r"Round 2 is abandoned: 0 of 3 clients sent .* team-\w+ refused: it has no signature"
    ):
        run(home, output, keys="auto", rounds=2, train=train)
    with pytest.raises(ConfigError, match=r"none\.json is not a file; expected a list of keys"):
        run(home, tmp_path / "other", keys=str(tmp_path / "none.json"))


@pytest.mark.parametrize("aggregator", ["fedavg", "exact"])
def test_one_client_and_one_round_are_central_training(home, whole, tmp_path, aggregator):
    """A Trainer on the same package, data and seed, with nothing federated about it."""
    package, jobs = load_package(whole[0] / "package"), []

    def train(job):
        jobs.append(job)
        IN_PROCESS(job)

    run(home, tmp_path / "run", train=train, cohort=1, rounds=1, aggregator=aggregator)
    [job] = jobs
    start = read_manifest(job.adapter, AdapterManifest)
    model = attach_lora(package, package.architecture, start.lora)
    set_factors(model, read_factors(job.adapter), package.architecture, start.layers)
    settings = StreamingLoraConfig(output_dir=str(tmp_path / "trainer"), save_strategy="no", **job.training)
    StreamingLoraTrainer(
        model,
        settings,
        train_dataset=training_columns(load_examples(str(job.data))),
        processing_class=load_tokenizer(whole[0] / "package"),
    ).train()
    central = get_factors(model, package.architecture, start.layers)
    federated = read_factors(tmp_path / "run" / "rounds" / "0001" / "adapter")
    for module, (A_RI, B_OR) in central.items():
        if aggregator == "fedavg":
            assert torch.equal(federated[module].A_RI, A_RI)
            assert torch.equal(federated[module].B_OR, B_OR)
        else:
            product = B_OR.double() @ A_RI.double()
            found = federated[module].B_OR.double() @ federated[module].A_RI.double()
            assert torch.dist(found, product) <= 1e-6 * product.norm()


def test_a_run_that_harms_the_full_model_stops_after_two_rounds(home, tmp_path):
    output = tmp_path / "run"
    run(home, output, rounds=2)
    # A base that is better than anything that was trained.
    baseline = json.loads((output / "baseline.json").read_text())
    baseline["loss"]["base"] = 0.25
    (output / "baseline.json").write_text(json.dumps(baseline))
    for _ in range(2):
        with pytest.raises(FedLargeError, match=r"Stopped before round 3: .* worse than the base's 0\.250.* --no-stop"):
            run(home, output, rounds=3)
        assert not (output / "rounds" / "0003").exists()
    summary = run_federation(config_of(home, rounds=3), output, IN_PROCESS, stop=False)
    assert len(summary["rounds"]) == 3


def test_the_summary_has_the_transfer_report(whole):
    _, summary = whole
    report, loss = summary["transfer"], summary["loss"]
    assert report["loss"]["base"]["value"] == pytest.approx(loss["base"])
    assert report["loss"]["full_model"]["value"] == pytest.approx(summary["rounds"][-1]["loss_full"])
    assert report["loss"]["package_trained"]["value"] == pytest.approx(summary["rounds"][-1]["loss_small"])
    assert report["gain"]["low"] > 0


def test_the_summary_is_what_a_model_card_reads(whole):
    output, summary = whole
    assert (summary["simulated"], summary["data"], summary["eval_data"]) == (True, "data.jsonl", None)
    card = render_card(output / "merged", "me/model", summary)
    assert "simulated on one machine" in card
    assert str(output.parent.parent) not in card
    assert f"| base | {summary['loss']['base']:.4f} |" in card
    assert "3 of 4: " in card
    assert "team-" in card
    assert "not recorded" in card  # the license, which this base does not declare


def test_held_out_examples_are_never_trained_on(whole):
    output, _ = whole
    held_out = set((output / "held_out.jsonl").read_text().splitlines())
    trained = {line for path in output.glob("clients/*/train.jsonl") for line in path.read_text().splitlines()}
    assert len(held_out) == 8
    assert len(trained) == 40
    assert not held_out & trained


def test_a_client_in_its_own_process_gives_the_same_bytes(home, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    run(home, tmp_path / "one", rounds=1, cohort=1)
    run(home, tmp_path / "two", train=LAUNCHERS["accelerate"](), rounds=1, cohort=1)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_a_finished_run_can_be_given_more_rounds(home, whole, tmp_path):
    run(home, tmp_path / "run", rounds=1)
    # As a version wrote it that didn't know a setting, which is now as it was without it.
    path = tmp_path / "run" / "federation.json"
    found = json.loads(path.read_text())
    assert found["settings"].pop("heal_steps") == 0
    path.write_text(json.dumps(found))
    run(home, tmp_path / "run", rounds=2)
    assert fingerprint(tmp_path / "run") == fingerprint(whole[0])


def test_killed_anywhere_a_rerun_ends_with_the_same_bytes(home, whole, tmp_path):
    """SIGKILL before and after every step in turn, each time in a run that goes on from where the last was killed."""
    output = tmp_path / "run"
    # Children of a server that has imported everything once; importing anew takes seconds each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_fedlarge.rounds", "hf_fedlarge.trainers.launch"])
    kills = 0
    # Each rerun gets further than what was done already, or is killed while doing it.
    for step in (2, 5, 9, 12, 13, 14, 12, 8, 7, 6, 8, 5, 4):
        process = context.Process(target=killed.run_until, args=(home / "federation.yaml", output, step))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills >= 8
    run(home, output)
    assert fingerprint(output) == fingerprint(whole[0])


def test_other_settings_do_not_go_on_with_a_run(home, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(ConfigError, match="was run with other settings for aggregator, seed"):
        run(home, tmp_path / "run", seed=1, aggregator="fedavg")


def test_rounds_that_begin_later_train_by_other_arguments_and_what_was_begun_goes_on_as_it_was(home, whole, tmp_path):
    class Killed(BaseException):
        pass

    output, rates = tmp_path / "run", {}
    shutil.copytree(whole[0], output)
    settings = config_of(home).training

    def go_on(rate, survivors):
        def train(job):
            if len(rates) == survivors:
                raise Killed
            rates[job.round, job.client] = job.training["learning_rate"]
            lora = LoraSettings(rank=4, alpha=8)
            make_update(
                job.output, job.package, job.client, lora=lora, adapter=job.adapter, round_number=job.round, examples=9
            )

        config = config_of(home, rounds=4, training=settings | {"learning_rate": rate})
        run_federation(config, output, train, stop=False)

    with pytest.raises(Killed):
        go_on(5e-3, 1)
    go_on(1e-3, None)
    assert [rates[key] for key in sorted(rates)] == [5e-3] * 3 + [1e-3] * 3
    begun = [entry["training"]["learning_rate"] for entry in Journal(output / "journal.jsonl").find("selected")]
    assert begun == [1e-2, 1e-2, 5e-3, 1e-3]


def test_a_round_that_was_closed_is_aggregated_as_it_was_begun(home, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def train(job):
        if job.client == "team-red":
            raise ClientFailedError("the battery is empty")
        lora = LoraSettings(rank=4, alpha=8)
        make_update(job.output, job.package, job.client, lora=lora, adapter=job.adapter, examples=9)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.rounds.aggregate_updates", killed)
        with pytest.raises(Killed):
            run(home, tmp_path / "run", train, cohort=None, rounds=1)
    changes = {"min_updates": 4, "deadline_seconds": 60.0, "late": "buffer"}
    [entry] = run(home, tmp_path / "run", train, cohort=None, rounds=1, **changes)["rounds"]
    assert len(entry["clients"]) == 3


def test_two_servers_on_one_run_are_kept_apart(home, tmp_path):
    def train(job):
        with pytest.raises(OutputError, match="is in use by another server"):
            run(home, tmp_path / "run")
        IN_PROCESS(job)

    run(home, tmp_path / "run", train=train, rounds=1, cohort=1)


def test_a_client_that_fails_or_cheats_is_named_and_the_round_goes_on(home, tmp_path):
    def train(job):
        if job.client == "team-red":
            raise ClientFailedError("out of memory")
        if job.client == "team-blue":
            make_update(job.output, job.package, "team-blue", round_number=7)
        else:
            IN_PROCESS(job)

    summary = run(home, tmp_path / "run", train=train, rounds=1, cohort=None)
    [entry] = summary["rounds"]
    assert {client["client"] for client in entry["clients"]} == {"team-green", "team-white"}
    reasons = {refused["client"]: refused["reason"] for refused in entry["refused"]}
    assert reasons["team-red"] == "out of memory"
    assert "expected round 1" in reasons["team-blue"]


def test_a_mistake_can_be_mended_and_the_run_begun_again(home, tmp_path):
    raw = yaml.safe_load((home / "federation.yaml").read_text())
    raw["data"]["column"] = "taem"
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(raw))
    assert main(["run", str(tmp_path / "federation.yaml")]) == 2
    raw["data"]["column"], raw["rounds"] = "team", 1
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(raw))
    assert main(["run", str(tmp_path / "federation.yaml")]) == 0


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"calibration": "nowhere.jsonl"}, DataError, "There is no such file as nowhere.jsonl"),
        ({"tiers": {"phone": TierSettings(memory="64GB")}}, ConfigError, "The tier phone is for 64000 MB, but the one"),
        ({"tiers": {"phone": TierSettings(memory="1MB")}}, ConfigError, "1 MB are too few for a client"),
        ({"tiers": {"phone": TierSettings(memory="9MB", keep_layers=9)}}, ConfigError, "9 is out of range"),
    ],
)
def test_settings_that_make_no_package_do_not_become_the_run_s(home, tmp_path, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        run(home, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "federation.json").exists()


ASSISTANT_ONLY = {"assistant_only_loss": True}


@pytest.mark.parametrize(
    ("template", "training", "sentence"),
    [
        (None, {}, "the model's tokenizer has no chat template; take an instruction-tuned model"),
        (None, ASSISTANT_ONLY, "but this model has no chat template; leave it out"),
        (
            MISTRAL,
            ASSISTANT_ONLY,
            r"assistant_only_loss .* needs a chat template that marks what the assistant says, but trl knows none for "
            r"this model, whose own does not; leave it out, so that .*, or take a local copy of .* {% generation %} … ",
        ),
        (
            "{% for m in messages %}{{ raise_exception('no 47') if ' 47.' in m.content }}{{ m.content }}{% endfor %}",
            {},
            "The model's chat template can't be used for an example: no 47",
        ),
        (MISTRAL, {"max_length": 4}, "None of the 48 examples has a labelled token within 4 tokens"),
    ],
)
def test_examples_that_can_not_be_rendered_or_count_nothing_do_not_become_the_run_s(
    home, tmp_path, template, training, sentence
):
    checkpoint = shutil.copytree(home / "checkpoint", tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").unlink()
    if template is not None:
        (checkpoint / "chat_template.jinja").write_text(template)
    changes = {"checkpoint": str(checkpoint), "training": config_of(home).training | training}
    with pytest.raises(DataError, match=sentence):
        run(home, tmp_path / "run", **changes)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("eval_data", [False, True])
def test_what_clients_train_on_must_be_chats_where_the_assistant_s_turns_alone_count(home, tmp_path, eval_data):
    (tmp_path / "data.jsonl").write_text('{"text": "red", "team": "a"}\n{"text": "blue", "team": "a"}\n')
    data = config_of(home).data.model_copy(update={"source": str(tmp_path / "data.jsonl")})
    changes = {"data": data, "training": config_of(home).training | ASSISTANT_ONLY, "cohort": None}
    changes["eval_data"] = str(home / "data.jsonl") if eval_data else None
    with pytest.raises(DataError, match="in chats, but what clients train on are none; leave it out"):
        run(home, tmp_path / "run", **changes)


@pytest.fixture(scope="module")
def given(home, whole, tmp_path_factory):
    """The whole run's package as it comes from elsewhere, with a card, and a federation's file that names it."""
    path = tmp_path_factory.mktemp("given")
    shutil.copytree(whole[0] / "package", path / "package")
    (path / "package" / "README.md").write_text("A card.")
    federation = yaml.safe_load((home / "federation.yaml").read_text()) | {"package": str(path / "package")}
    del federation["keep_layers"]
    (path / "federation.yaml").write_text(yaml.safe_dump(federation))
    return path


def test_a_run_takes_a_package_that_was_made_elsewhere_and_goes_on_with_its_copy(given, whole, tmp_path):
    class Stopped(BaseException):
        pass

    def train(job):
        assert job.package == tmp_path / "run" / "package"
        raise Stopped

    with pytest.raises(Stopped):
        run(given, tmp_path / "run", train)
    digests = [read_manifest(path / "package", PackageManifest).digest for path in (tmp_path / "run", whole[0])]
    assert digests[0] == digests[1]
    assert not (tmp_path / "run" / "package" / "README.md").exists()
    (given / "package").rename(given / "away")
    with pytest.raises(Stopped):
        run(given, tmp_path / "run", train)
    (given / "away").rename(given / "package")


def test_a_given_package_may_lie_below_the_home(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(given))
    text = (given / "federation.yaml").read_text().replace(str(given / "package"), "~/package")
    assert "~/package" in text
    (tmp_path / "federation.yaml").write_text(text)
    assert load_federation(tmp_path / "federation.yaml").package == str(given / "package")


def test_a_given_package_is_looked_at_before_anything_else(given, tmp_path):
    with pytest.raises(ArtifactError, match="is not a directory; expected a package"):
        run(given, tmp_path / "run", package=str(tmp_path / "nowhere"), checkpoint="nobody/nothing")
    shutil.copytree(given / "package", tmp_path / "package")
    with (tmp_path / "package" / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match="has the digest"):
        run(given, tmp_path / "run", package=str(tmp_path / "package"), checkpoint="nobody/nothing")
    make_checkpoint(tmp_path / "other", layers=4, tokenizer=True, seed=5)
    with pytest.raises(ArtifactError, match=r"package is a package of checkpoint with .*; give the package of this ch"):
        run(given, tmp_path / "run", checkpoint=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="no_proj"):
        run(given, tmp_path / "run", lora=LoraSettings(targets=["no_proj"]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_update_that_cannot_be_read_or_is_signed_by_another_does_not_stop_the_round(home, tmp_path):
    def train(job):
        IN_PROCESS(job)
        manifest = job.output / "fedlarge.json"
        if job.client == "team-blue":
            manifest.write_text("{")
        if job.client == "team-red":
            manifest.write_text(manifest.read_text().replace('"team-red"', '"team-white"'))

    summary = run(home, tmp_path / "run", train=train, rounds=1, cohort=None)
    [entry] = summary["rounds"]
    assert [client["client"] for client in entry["clients"]] == ["team-green", "team-white"]
    assert {refused["client"] for refused in entry["refused"]} == {"team-blue", "team-red"}
    assert set(entry["bytes_by_client"]) == {"team-blue", "team-green", "team-red", "team-white"}


def saying(said):
    """Clients that make an update each, whose manifest says besides what `said` has for them."""

    def train(job):
        lora = LoraSettings(rank=4, alpha=8)
        make_update(job.output, job.package, job.client, lora=lora, adapter=job.adapter, examples=9)
        path = job.output / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | said[job.client]))

    return train


def test_an_update_whose_weight_can_not_be_told_is_refused_when_it_comes_and_zeros_count_alike(home, tmp_path):
    """Before the round is closed, after which an aggregation that can't be made could never be."""
    said = {
        "team-blue": {"loss_before": 1.0, "loss_after": 2.0},
        "team-green": {"loss_before": 2.0, "loss_after": 2.0},
        "team-red": {},
        "team-white": {"loss_before": 1.7e308, "loss_after": -1.7e308},
    }

    summary = run(home, tmp_path / "run", train=saying(said), rounds=1, cohort=None, weighting="loss")
    [entry] = summary["rounds"]
    assert {client["client"]: client["weight"] for client in entry["clients"]} == {"team-blue": 0.5, "team-green": 0.5}
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    causes = {refused["client"]: refused["reason"] for refused in journal.find("validated", accepted=False)}
    assert "has no held-out loss" in causes["team-red"]
    assert "loss_before: Input should be less than" in causes["team-white"]


def gained(update):
    return update.loss_before - update.loss_after


def test_an_update_that_a_weighting_of_ones_own_fails_on_or_gives_none_is_refused_when_it_comes(home, tmp_path):
    said = {
        "team-blue": {"loss_before": 2.0, "loss_after": 1.0},
        "team-green": {"loss_before": 1.0, "loss_after": 2.0},
        "team-red": {},
        "team-white": {"loss_before": 2.0, "loss_after": 1.5},
    }

    summary = run(home, tmp_path / "run", train=saying(said), rounds=1, cohort=None, weighting="test_rounds:gained")
    [entry] = summary["rounds"]
    assert [client["client"] for client in entry["clients"]] == ["team-blue", "team-white"]
    causes = {refused["client"]: refused["reason"] for refused in entry["refused"]}
    assert "team-green refused: The weighting test_rounds:gained gave -1.0 for team-green" in causes["team-green"]
    assert "test_rounds:gained failed for team-red with TypeError: unsupported operand" in causes["team-red"]


def test_a_round_whose_adapter_is_broken_names_whose_updates_it_has_and_is_asked_for_again(home, tmp_path, monkeypatch):
    def train(job):
        lora = LoraSettings(rank=4, alpha=8)
        make_update(job.output, job.package, job.client, lora=lora, adapter=job.adapter, examples=9)

    def ending(loss, adapter, error, match, **changes):
        """A run that evaluates so ends with this error; others have a loss of 2."""

        def evaluate(*_, **how):
            return Evaluation(loss if bool(how["adapter"]) is adapter else 2.0, tokens=1, examples=1)

        with monkeypatch.context() as patched:
            patched.setattr("hf_fedlarge.rounds.evaluate", evaluate)
            with pytest.raises(error, match=match):
                run(home, tmp_path / "run", train, cohort=None, rounds=1, **changes)

    ending(math.nan, False, DataError, "The loss over 1 tokens is nan; the model or its adapter is broken")
    names = "team-blue, team-green, team-red, team-white"
    for _ in range(2):
        ending(math.inf, True, UpdateRefusedError, f"loss_full is inf with the adapter made of the updates of {names},")
    assert not (tmp_path / "run" / "rounds" / "0001").exists()
    [entry] = run(home, tmp_path / "run", train, cohort=None, rounds=1)["rounds"]
    assert len(entry["clients"]) == 4
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    assert [entry["broken"] for entry in journal.find("abandoned")] == [True, True]
    assert len(journal.find("selected")) == 3


def test_what_clients_say_of_their_held_out_losses_is_kept_and_averaged(home, tmp_path):
    said = {
        "team-blue": {"loss_before": 2.0, "loss_after": 1.0},
        "team-green": {"loss_before": 3.0, "examples": 3},
        "team-red": {},
        "team-white": {"loss_before": 2e6},
    }
    lines = []

    config = config_of(home, rounds=1, cohort=None)
    [entry] = run_federation(config, tmp_path / "run", saying(said), lines.append)["rounds"]
    assert entry["client_loss"] == {"before": (2.0 * 9 + 3.0 * 3) / 12, "clients": 2}
    assert entry == json.loads((tmp_path / "run" / "rounds" / "0001" / "round.json").read_text())
    [line] = [line for line in lines if line.startswith("round 1 committed")]
    assert line.endswith("(full model), 2.250 on held-out examples of 2 clients before it")
    received = Journal(tmp_path / "run" / "journal.jsonl").find("received")
    kept = {each["client"]: (each.get("loss_before"), each.get("loss_after")) for each in received}
    assert kept == {
        "team-blue": (2.0, 1.0),
        "team-green": (3.0, None),
        "team-red": (None, None),
        "team-white": (None, None),
    }
    assert [refusal["client"] for refusal in entry["refused"]] == ["team-white"]


def test_numbers_in_a_file_are_numbers(home, tmp_path):
    text = (home / "federation.yaml").read_text().replace("learning_rate: 0.01", "learning_rate: 5e-4")
    (tmp_path / "federation.yaml").write_text(text)
    assert load_federation(tmp_path / "federation.yaml").training["learning_rate"] == 5e-4


def test_a_round_below_its_quorum_commits_nothing(home, tmp_path):
    def train(job):
        if job.client != "team-green":
            raise ClientFailedError("the battery is empty")
        IN_PROCESS(job)

    with pytest.raises(
        UpdateRefusedError, match="Round 1 is abandoned: 1 of 4 clients sent a valid update; at least 2 are needed"
    ):
        run(home, tmp_path / "run", train=train, cohort=None, min_updates=2, rounds=1)
    assert not (tmp_path / "run" / "rounds" / "0001").exists()
    run(home, tmp_path / "run", cohort=None, min_updates=2, rounds=1)
    assert (tmp_path / "run" / "rounds" / "0001").exists()


def test_a_damaged_package_is_not_trained_on(home, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rounds" / "0002")
    with (tmp_path / "run" / "package" / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ArtifactError, match="has the digest"):
        run(home, tmp_path / "run")


def test_the_command_runs_it_and_prints_the_figures(home, whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    assert main(["run", str(home / "federation.yaml"), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("computing on the CPU, 1 thread\n")
    assert f"{whole[1]['loss']['base']:.3f}" in printed
    assert f"{whole[1]['loss']['merged']:.3f}" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint": "/nowhere"}, "no such directory"),
        ({"keep_layers": 0}, "out of range"),
        ({"keep_layers": "0-9"}, "not in 0-3"),
        ({"cohort": 9}, "The data makes 4 clients; 9 are wanted in a round"),
        (
            {"aggregator": "krum", "weighting": "equal", "byzantine": 1, "cohort": None},
            "The data makes 4 clients; 5 are wanted in a round",
        ),
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1"),
        ({"aggregator": "mean"}, "aggregator: Input should be 'exact', "),
        ({"colour": "red"}, "colour is not known; expected "),
        ({"data": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"data": None}, "has no data, which simulated clients are made of"),
        ({"lora": {"rank": 0}}, "lora.rank: Input should be greater"),
        ({"lora": {"targets": ["no_proj"]}}, "LoRA target 'no_proj' is no matrix"),
        ({"training": {"speed": 9}}, "speed"),
        ({"training": {"max_length": None}}, "max_length"),
        ({"min_updates": 5}, "min_updates is 5, but a cohort has only 3 clients"),
    ],
)
def test_a_bad_federation_gets_one_sentence_and_exit_code_2(home, tmp_path, capsys, changes, sentence):
    raw = yaml.safe_load((home / "federation.yaml").read_text()) | changes
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(raw))
    assert main(["run", str(tmp_path / "federation.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-fedlarge run: ")
    assert sentence in error
    assert not (tmp_path / "run" / "rounds" / "0001").exists()


@pytest.mark.parametrize("text", ["- a list", "{", "", "\x00"])
def test_a_file_that_is_no_federation(tmp_path, capsys, text):
    (tmp_path / "federation.yaml").write_text(text)
    assert main(["run", str(tmp_path / "federation.yaml")]) == 2
    assert main(["run", str(tmp_path / "missing.yaml")]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_cohorts_are_drawn_evenly_and_repeat():
    clients = [CheckIn(f"c{index}", examples=5) for index in range(10)]
    drawn = [tuple(sample_cohort(clients, 3, seed=1, round_number=number)) for number in range(300)]
    assert drawn == [tuple(sample_cohort(clients[::-1], 3, seed=1, round_number=number)) for number in range(300)]
    counts = [sum(client.client in cohort for cohort in drawn) for client in clients]
    assert all(60 < count < 120 for count in counts)
    assert all(len(set(cohort)) == 3 for cohort in drawn)


def test_clients_without_data_or_memory_are_left_out():
    clients = [CheckIn("a", 5, 100), CheckIn("b", 5, 10), CheckIn("c", 0, 100), CheckIn("d", 5)]
    assert sample_cohort(clients, None, 0, 1, needed_bytes=50) == ["a", "d"]
    with pytest.raises(ConfigError, match="2 of 4 clients"):
        sample_cohort(clients, 3, 0, 1, needed_bytes=50)


def test_an_example_too_few_is_said(tmp_path):
    write_jsonl(from_rows([{"text": "one"}]), tmp_path / "data.jsonl")
    make_checkpoint(tmp_path / "checkpoint", layers=4, tokenizer=True)
    federation = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "data": {"source": str(tmp_path / "data.jsonl"), "clients": 1},
    }
    Path(tmp_path / "federation.yaml").write_text(yaml.safe_dump(federation))
    with pytest.raises((ConfigError, DataError), match="hold out"):
        run_federation(load_federation(tmp_path / "federation.yaml"), tmp_path / "run", IN_PROCESS)
