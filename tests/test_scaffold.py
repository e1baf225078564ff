"""SCAFFOLD: the correction and the control variates in closed form, what it is good for, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from federation import LORA, TRAINING, make_examples, make_federation, make_update
from safetensors.torch import load_file, save_file

from hf_fedlarge.artifacts import CONTROL_WEIGHTS, AdapterManifest, UpdateManifest, describe_files, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import AggregationSettings, FederationConfig
from hf_fedlarge.errors import ConfigError, UpdateRefusedError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.merge import merge
from hf_fedlarge.scaffold import read_common, write_common, write_control
from hf_fedlarge.tensors import Factors
from hf_fedlarge.traffic import changed_bytes
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.scaffold import Corrected
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig

SETTINGS = AggregationSettings(aggregator="fedavg", scaffold=True)
# One step of plain descent on all of a client's examples: its gradient can be read off the way it went.
ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 12,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
    "bf16": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaffold")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=1, aggregator="fedavg", scaffold=True)
    for seed, client in enumerate(("ann", "bob")):
        make_examples(path / f"{client}.jsonl", count=12, seed=seed)
    return path


def train(home, output, client, adapter, state, number=1):
    arguments = ClientArguments(
        package=str(home / "package"),
        adapter=str(adapter),
        data=str(home / f"{client}.jsonl"),
        eval_examples=0,
        held_out=0.0001,
        output=str(output),
        client=client,
        round=number,
        state=str(state) if state else None,
    )
    train_client(arguments, StreamingLoraConfig(output_dir=str(output), **TRAINING | ONE_STEP))
    return load_file(output / "adapter_model.safetensors"), load_file(output / CONTROL_WEIGHTS)


def test_a_step_goes_along_g_less_the_client_s_own_mean_plus_everybody_s(home, tmp_path):
    start = load_file(home / "start" / "adapter_model.safetensors")
    first = {}
    for client in ("ann", "bob"):
        weights, own = train(home, tmp_path / client, client, home / "start", tmp_path / f"{client}-state")
        for name, gradient in own.items():  # c and cᵢ are zero: an ordinary step, along what is reported
            torch.testing.assert_close(start[name] - 0.5 * gradient, weights[name])
        first[client] = own
    assert any(gradient.any() for gradient in first["ann"].values())
    updates = [tmp_path / "ann", tmp_path / "bob"]
    after = tmp_path / "after"
    aggregate_updates(updates, home / "package", after, settings=SETTINGS, previous=home / "start", population=5)
    common = load_file(after / CONTROL_WEIGHTS)
    for name, c in common.items():  # of five clients three never took part
        torch.testing.assert_close(c, (first["ann"][name] + first["bob"][name]) / 5)

    # The second round, as ann, and as one who never took part: the same g, another cᵢ.
    weights, own = train(home, tmp_path / "second", "ann", after, tmp_path / "ann-state", number=2)
    fresh, g = train(home, tmp_path / "fresh", "ann", after, tmp_path / "new-state", number=2)
    before = load_file(after / "adapter_model.safetensors")
    for name, c in common.items():
        torch.testing.assert_close(fresh[name], before[name] - 0.5 * (g[name] + c))
        torch.testing.assert_close(weights[name], before[name] - 0.5 * (g[name] - first["ann"][name] + c))
        torch.testing.assert_close(own[name], g[name] - first["ann"][name])


def test_clients_that_drift_apart_end_at_the_federation_s_optimum(tmp_path):
    """Two clients with losses ½ hᵢ ‖B − bᵢ‖², ten steps a round: without correction their mean ends beside it."""
    curvature, optima = (1.0, 8.0), (torch.full((3, 2), 1.0), torch.full((3, 2), -1.0))
    best = sum(h * b for h, b in zip(curvature, optima, strict=True)) / sum(curvature)
    ends = {}
    for corrected in (False, True):
        B_OR, own = torch.zeros(3, 2), [torch.zeros(3, 2)] * 2
        control = tmp_path / f"{corrected}-0"
        control.mkdir()
        write_control(control, {"m": Factors(torch.zeros(2, 4), torch.zeros(3, 2))})
        for number in range(1, 41):
            results, updates = [], []
            for client, (h, b) in enumerate(zip(curvature, optima, strict=True)):
                parameter = torch.nn.Parameter(B_OR.clone())
                common = read_common(control, ["m"])["m"].B_OR
                correction = (common - own[client]) * corrected
                callback = Corrected([(parameter, correction)])
                callback.on_train_begin(None, SimpleNamespace(global_step=0), None)
                for _ in range(10):
                    parameter.grad = h * (parameter.detach() - b)
                    callback.on_pre_optimizer_step()
                    parameter.data.sub_(parameter.grad, alpha=0.05)
                results.append(parameter.detach())
                mean = callback.mean(parameter)
                updates.append(tmp_path / f"{corrected}-{number}-{client}")
                updates[-1].mkdir()
                write_control(updates[-1], {"m": Factors(torch.zeros(2, 4), mean - own[client])})
                own[client] = mean
            B_OR = sum(results) / 2
            after = tmp_path / f"{corrected}-{number}"
            after.mkdir()
            write_common(after, control, updates, population=2)
            control = after
        ends[corrected] = torch.dist(B_OR, best).item()
    assert ends[False] > 0.3
    assert ends[True] < 1e-3


def test_without_a_directory_of_its_own_a_client_does_not_begin(home, tmp_path):
    with pytest.raises(ConfigError, match="give --state, a directory of this client's own"):
        train(home, tmp_path / "update", "ann", home / "start", None)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        ("missing", r"its files are .*; only .*control\.safetensors"),
        ("infinite", "its control variate's B of .* holds NaN or infinity"),
        ("huge", "its control variate's A of .* has the norm 1e\\+09"),
        ("short", "its tensor .* is missing"),
    ],
)
def test_a_bad_control_variate_is_refused_by_name(home, tmp_path, spoil, cause):
    update = tmp_path / "ann"
    factors = make_update(update, home / "package", "ann", adapter=home / "start")
    module = next(iter(factors))
    if spoil == "infinite":
        factors[module].B_OR[0, 0] = torch.inf
    if spoil == "huge":
        factors[module].A_RI.fill_(0)[0, 0] = 1e9
    if spoil != "missing":
        write_control(update, factors)
    if spoil == "short":
        tensors = load_file(update / CONTROL_WEIGHTS)
        save_file(dict(list(tensors.items())[1:]), update / CONTROL_WEIGHTS)
    manifest = read_manifest(update, UpdateManifest)
    (update / "fedlarge.json").unlink()
    manifest = manifest.model_copy(update={"files": describe_files(update)})
    (update / "fedlarge.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    how = {"settings": SETTINGS, "previous": home / "start"}
    with pytest.raises(UpdateRefusedError, match=f"ann refused: {cause}"):
        aggregate_updates([update], home / "package", tmp_path / "next", **how)


def test_one_that_nobody_asked_for_is_refused(home, tmp_path):
    start_adapter(home / "package", tmp_path / "plain", LORA, seed=1, aggregator="fedavg")
    write_control(tmp_path, make_update(tmp_path / "ann", home / "package", "ann", adapter=tmp_path / "plain"))
    (tmp_path / CONTROL_WEIGHTS).rename(tmp_path / "ann" / CONTROL_WEIGHTS)
    with pytest.raises(UpdateRefusedError, match=r"holds control\.safetensors, which its manifest does not list"):
        aggregate_updates(
            [tmp_path / "ann"], home / "package", tmp_path / "next", aggregator="fedavg", previous=tmp_path / "plain"
        )


def test_it_can_not_be_begun_or_left_between_two_rounds(home, tmp_path, capsys):
    make_update(tmp_path / "ann", home / "package", "ann", adapter=home / "start")
    words = ["aggregate", str(tmp_path / "ann"), "--package", str(home / "package"), "-o", str(tmp_path / "next")]
    assert main([*words, "--adapter", str(home / "start"), "--aggregator", "fedavg"]) == 2
    assert "was made with scaffold; go on as it was" in capsys.readouterr().err
    assert main([*words, "--aggregator", "fedavg", "--scaffold"]) == 2
    assert "scaffold needs --adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aggregator": "exact"}, "use fedavg or ffa"),
        ({"codec": "int8"}, "can't be used with the codec int8"),
        ({"late": "buffer"}, "can't be used with late updates"),
    ],
)
def test_what_it_does_not_go_with_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        FederationConfig(checkpoint="c", data={"source": "s"}, **{"aggregator": "fedavg", "scaffold": True} | changes)


def test_clients_download_it_and_nobody_else_needs_it(home, tmp_path):
    start = read_manifest(home / "start", AdapterManifest)
    assert changed_bytes(home / "start", None) > start.total_bytes
    merge(home / "checkpoint", home / "start", tmp_path / "with")
    (home / "start" / CONTROL_WEIGHTS).rename(tmp_path / CONTROL_WEIGHTS)
    try:
        merge(home / "checkpoint", home / "start", tmp_path / "without")
    finally:
        (tmp_path / CONTROL_WEIGHTS).rename(home / "start" / CONTROL_WEIGHTS)
