"""A tiny federation's pieces for tests: a checkpoint, its package, clients' examples, updates made without training."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from families import make_checkpoint
from peft import PeftModel
from transformers import PreTrainedModel

from hf_fedlarge.adapters import AdapterReader, initial_factors, peft_warnings
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, UpdateManifest, read_manifest
from hf_fedlarge.config import Codec, FederationConfig, LoraSettings, load_federation
from hf_fedlarge.data import from_rows, write_jsonl
from hf_fedlarge.jobs import Train
from hf_fedlarge.keys import read_key
from hf_fedlarge.package import package_architecture, package_config
from hf_fedlarge.rounds import run_federation
from hf_fedlarge.shrink import plan_shrink, shrink
from hf_fedlarge.tensors import Factors
from hf_fedlarge.trainers.launch import LAUNCHERS
from hf_fedlarge.update import write_update
from hf_fedlarge.wire import Wire

TEAMS = ("blue", "green", "red")
LORA = LoraSettings(rank=4, alpha=8.0)
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_length": 64,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "seed": 7,
}


def make_federation(path: Path, family: str = "llama") -> tuple[Path, Path]:
    """(checkpoint of four layers, package of three of them)."""
    checkpoint = make_checkpoint(path / "checkpoint", family, layers=4, tokenizer=True)
    shrink(plan_shrink(checkpoint, keep_layers="0,2,3"), path / "package")
    return checkpoint, path / "package"


def make_examples(path: Path, count: int = 12, seed: int = 0) -> Path:
    """A file of conversational prompts and completions that are easy to learn."""
    words = ["red", "green", "blue", "white"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {words[(index + seed) % 4]} {index}."}],
            "completion": [{"role": "assistant", "content": words[(index + seed) % 4] * (1 + index % 3)}],
        }
        for index in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(from_rows(rows), path)
    return path


def make_update(
    output: Path,
    package: Path,
    client: str,
    *,
    seed: int = 0,
    adapter: Path | None = None,
    round_number: int = 1,
    lora: LoraSettings = LORA,
    examples: int = 10,
    tokens: int = 100,
    codec: Codec | None = None,
    frozen: str = "",
    key: Path | None = None,
) -> dict[str, Factors]:
    """Write an update with random factors, as a client would; returns the factors.

    A `codec` other than fp32 needs `adapter`; `frozen` names the letters of the factors that stay as they are there;
    `key` is the private key that signs it.
    """
    small = read_manifest(package, PackageManifest)
    architecture = describe(package_config(package))
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: Factors(A_RI, torch.randn(B_OR.shape, generator=generator))
        for module, (A_RI, B_OR) in initial_factors(architecture, small.kept_layers, lora, seed).items()
    }
    wire = None
    if codec:
        wire = Wire(codec, AdapterReader(adapter), package_architecture(package, small), small.kept_layers, lora)
        for module, pair in factors.items():
            kept = wire.parent_factors(module)
            factors[module] = Factors(*(kept[i] if "AB"[i] in frozen else pair[i] for i in range(2)))
    manifest = UpdateManifest(
        files={},
        client=client,
        round=round_number,
        package=small.digest,
        adapter=read_manifest(adapter, AdapterManifest).digest if adapter else None,
        lora=lora,
        codec=codec or Codec(),
        examples=examples,
        tokens=tokens,
    )
    private = read_key(key) if key else None
    write_update(output, factors, manifest, architecture, small.base, wire=wire, key=private)
    return factors


def plug_in(model: PreTrainedModel, directory: Path) -> PeftModel:
    """A full model with an adapter directory plugged in, by nothing but PEFT."""
    with peft_warnings():
        return PeftModel.from_pretrained(model, directory)


def make_teams(home: Path, rounds: int = 2, **changes: Any) -> FederationConfig:
    """A federation's file and data in `home`, for simulated clients and for real ones."""
    make_checkpoint(home / "checkpoint", layers=2, tokenizer=True)
    rows = [{"text": f"{TEAMS[index % 3]} {index}", "team": TEAMS[index % 3]} for index in range(18)]
    write_jsonl(from_rows(rows), home / "data.jsonl")
    write_jsonl(from_rows([{"text": f"{team} 100"} for team in TEAMS]), home / "public.jsonl")
    federation = {
        "checkpoint": str(home / "checkpoint"),
        "data": {"source": str(home / "data.jsonl"), "split": "column", "column": "team", "held_out": 0.2},
        "eval_data": str(home / "public.jsonl"),
        "clients": dict.fromkeys(TEAMS, 6),
        "keep_layers": 1.0,
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "rounds": rounds,
        "codec": "int8",
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True},
    }
    (home / "federation.yaml").write_text(yaml.safe_dump(federation | changes))
    return load_federation(home / "federation.yaml")


def run_teams(home: Path, rounds: int = 2, train: Train | None = None) -> None:
    """`make_teams`, and its run with simulated clients, who train in this process, or as `train` says."""
    run_federation(make_teams(home, rounds), home / "run", train or LAUNCHERS["inprocess"](), stop=False)


def adapter_digests(run: Path) -> list[str]:
    """Of the adapters that a run has, in the order of rounds."""
    return [read_manifest(path, AdapterManifest).digest for path in sorted(run.glob("rounds/0*/adapter"))]


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    """What a journal that is being written says so far: these events, or all."""
    path = run / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if not names or entry["event"] in names]
