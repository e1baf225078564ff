"""The command line: one subcommand a stage, each a function of the library.

Bad input gets one sentence on standard error and the exit code 2; nothing is written. Ctrl-C gets a line, and 130.
Libraries load after the arguments are known to be right, so that `--help` comes at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fedlarge.errors import ConfigError, FedLargeError, OutputError, os_problem
from hf_fedlarge.options import (
    add_aggregating,
    add_evaluation,
    add_exporting,
    add_flower,
    add_generating,
    add_joining,
    add_keys,
    add_overwrite,
    add_push,
    add_running,
    add_serving,
    add_shrinking,
    add_transfer,
    chosen_aggregation,
)
from hf_fedlarge.progress import hide_bars, progress_bar

if TYPE_CHECKING:
    from hf_fedlarge.config import FederationConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `train` takes every argument of SFTConfig, so its own program parses them.
    if arguments[:1] == ["train"]:
        from hf_fedlarge.trainers.client import main as train

        return train(arguments[1:])
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except FedLargeError as error:
        print(f"hf-fedlarge {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; the same command goes on where it was" if options.command in ("run", "serve", "join") else ""
        print(f"\nhf-fedlarge {options.command}: Interrupted{more}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; point it elsewhere so that the interpreter's last flush can't fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = os_problem(error)
        if reason is None:
            raise
        print(f"hf-fedlarge {options.command}: {error.filename or 'A file'}: {reason}.", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `train`, which has its own."""
    parser = argparse.ArgumentParser(prog="hf-fedlarge", description="Federated fine-tuning of large language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    one = command("shrink", _shrink, "Make a package: leave out neurons or layers, fit the rest in 4 bits.")
    add_shrinking(one)
    add_overwrite(one)

    commands.add_parser("train", help="Train adapters on a package with a client's data (train --help).")

    one = command("aggregate", _aggregate, "Validate updates and aggregate them into an adapter.")
    add_aggregating(one)
    add_overwrite(one)

    one = command("relay", _relay, "Make an update of an aggregate: an edge's, for the server above it.")
    one.add_argument("adapter", type=Path, help="what `aggregate` made of one round's updates")
    one.add_argument("-o", "--output", type=Path, required=True, help="the update directory to make")
    one.add_argument("--client", required=True, help="the edge's name")
    one.add_argument("--key", type=Path, help="sign the update with this key of `keys new`")
    add_overwrite(one)

    one = command("merge", _merge, "Fold an adapter into the full checkpoint.")
    one.add_argument("checkpoint", help="the full model: a directory, or a Hub id")
    one.add_argument("adapter", type=Path, help="the adapter directory")
    one.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint directory to make")
    one.add_argument("--revision", help="the Hub revision")
    one.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    add_overwrite(one)

    one = command("evaluate", _evaluate, "Print the held-out loss of a checkpoint or package, as JSON.")
    one.add_argument("model", help="a checkpoint (directory or Hub id) or a package directory")
    one.add_argument("--adapter", type=Path, help="an adapter to plug in")
    one.add_argument("--data", required=True, help="examples: a file, a Hub data set, or stdlib")
    one.add_argument("--revision", help="the Hub revision of the checkpoint")
    add_evaluation(one)

    add_generating(command("generate", _generate, "Print what a checkpoint or package answers to prompts (greedy)."))
    add_transfer(command("transfer", _transfer, "Compare what an adapter is worth on package and full model."))
    add_exporting(command("export", _export, "Write adapter and carry as one adapter, for peft alone."))

    text = "Run a whole federation from a file; run it again to go on after an interruption."
    add_running(command("run", _run, text))
    add_serving(command("serve", _serve, "Run a federation of clients that join over a store; again, to go on."))
    add_joining(command("join", _join, "Take part in a federation that is served over a store, until it is over."))
    add_flower(command("flower", _flower, "Federations on Flower: make a directory that `flwr run` starts one from."))
    add_keys(command("keys", _keys, "Keys that clients sign their updates with, and a server's list of them."))

    add_push(command("push", _push, "Publish a checkpoint, an adapter or a package on the Hub."))
    return parser


def _shrink(options: argparse.Namespace) -> None:
    from hf_fedlarge.artifacts import check_output
    from hf_fedlarge.calibrate import check_plan, make_package, plan_package
    from hf_fedlarge.config import PackageSettings, checked
    from hf_fedlarge.hub import resolve_checkpoint
    from hf_fedlarge.layers import format_ranges

    if not options.dry_run:
        check_output(options.output, options.overwrite)
    settings = checked(PackageSettings, {name: getattr(options, name) for name in PackageSettings.model_fields})
    checkpoint, revision = resolve_checkpoint(options.checkpoint, options.revision)
    if options.dry_run:
        print(check_plan(checkpoint, settings).describe())
        return
    with progress_bar("choosing", None, " layers") as choosing:
        plan = plan_package(checkpoint, settings, choosing)
    print(plan.describe())
    with (
        progress_bar("fitting", plan.layers, " layers") as fitting,
        progress_bar("shrinking", plan.package_bytes) as writing,
        progress_bar("healing", settings.heal_steps, " steps") as healing,
    ):
        manifest = make_package(
            plan,
            settings,
            options.output,
            base_id=options.base_id or (options.checkpoint if revision else None),
            revision=revision,
            overwrite=options.overwrite,
            fitting=fitting,
            writing=writing,
            healing=healing,
        )
    for entry in manifest.surrogates:
        print(f"surrogate for {format_ranges(entry.layers)}: explains {1 - entry.unexplained:.1%} of what they change")
    if healed := manifest.healed:
        print(f"healed: KL of the full model to it {healed.divergence:.3f} nats a token, {healed.without:.3f} before")
    elif settings.heal_steps:
        print("healing made the package no more like the full model and was left out; give more text or fewer steps")
    print(f"{options.output}: {manifest.total_bytes / 1e6:.1f} MB, digest {manifest.digest[:12]}")


def _aggregate(options: argparse.Namespace) -> None:
    from hf_fedlarge.collect import aggregate_updates
    from hf_fedlarge.config import make_codec

    collected = aggregate_updates(
        options.updates,
        options.package,
        options.output,
        previous=options.adapter,
        older=options.older,
        round_number=options.round,
        min_updates=options.min_updates,
        population=options.population,
        codec=make_codec(options.codec, options.topk_share),
        keys=options.keys,
        overwrite=options.overwrite,
        **chosen_aggregation(options),
    )
    for _, cause in collected.refused:
        print(cause, file=sys.stderr)
    for entry in collected.manifest.contributions:
        print(f"{entry.client}: weight {entry.weight:.4f} ({entry.tokens} tokens, {entry.examples} examples)")
    made = collected.manifest
    print(f"{options.output}: of the energy {made.energy_carried:.2%} carried, {made.energy_dropped:.2%} dropped")


def _relay(options: argparse.Namespace) -> None:
    from hf_fedlarge.relay import relay_update

    manifest = relay_update(
        options.adapter, options.client, options.output, key=options.key, overwrite=options.overwrite
    )
    print(f"{options.output}: {manifest.examples} examples, {manifest.tokens} tokens, digest {manifest.digest[:12]}")


def _merge(options: argparse.Namespace) -> None:
    from hf_fedlarge.artifacts import AdapterManifest, check_output, read_manifest
    from hf_fedlarge.hub import resolve_checkpoint
    from hf_fedlarge.merge import merge, plan_merge
    from hf_fedlarge.tensors import CheckpointReader

    if not options.dry_run:
        check_output(options.output, options.overwrite)
    read_manifest(options.adapter, AdapterManifest)
    checkpoint, _ = resolve_checkpoint(options.checkpoint, options.revision)
    if options.dry_run:
        print(plan_merge(checkpoint, options.adapter).describe())
        return
    total = sum(info.nbytes for info in CheckpointReader(checkpoint).infos.values())
    with progress_bar("merging", total) as advance:
        manifest = merge(checkpoint, options.adapter, options.output, overwrite=options.overwrite, progress=advance)
    print(f"{options.output}: {len(manifest.merged)} matrices merged, digest {manifest.digest[:12]}")


def _export(options: argparse.Namespace) -> None:
    from hf_fedlarge.export import export_adapter

    print(f"{options.output}: an adapter of rank {export_adapter(options.adapter, options.output).rank} for peft")


def _evaluate(options: argparse.Namespace) -> None:
    from hf_fedlarge.artifacts import AdapterManifest, read_manifest
    from hf_fedlarge.evaluation import as_record, evaluate
    from hf_fedlarge.hub import resolve_model
    from hf_fedlarge.processor import computing_device, describe_device

    if options.adapter:
        read_manifest(options.adapter, AdapterManifest)
    data, how = _evaluated(options)
    model = resolve_model(options.model, options.revision)
    print(describe_device(computing_device()), file=sys.stderr)
    print(json.dumps(as_record(evaluate(model, data, adapter=options.adapter, **how))))


def _generate(options: argparse.Namespace) -> None:
    from hf_fedlarge.generate import answer

    names = ("revision", "adapter", "prompt", "prompts", "output", "max_new_tokens", "batch_size", "plain")
    answer(options.model, **{name: getattr(options, name) for name in names})


def _transfer(options: argparse.Namespace) -> None:
    from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, read_manifest
    from hf_fedlarge.hub import resolve_checkpoint
    from hf_fedlarge.tables import print_transfer
    from hf_fedlarge.transfer import gradient_agreement, transfer_report

    if options.json and not options.json.parent.is_dir():
        raise OutputError(f"--json {options.json} can't be written: {options.json.parent} is no directory; make it.")
    if options.json and options.json.is_dir():
        raise OutputError(f"--json {options.json} can't be written: it is a directory; give a file in it.")
    read_manifest(options.package, PackageManifest)
    for adapter in filter(None, (options.adapter, options.reference)):
        read_manifest(adapter, AdapterManifest)
    data, how = _evaluated(options)
    checkpoint, _ = resolve_checkpoint(options.checkpoint, options.revision)
    report = transfer_report(checkpoint, options.package, options.adapter, data, reference=options.reference, **how)
    if options.gradients:
        report["gradient_agreement"] = gradient_agreement(checkpoint, options.package, options.adapter, data, **how)
    print_transfer(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _evaluated(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The examples to evaluate on, and how."""
    from hf_fedlarge.data import load_examples

    for name in ("max_length", "batch_size", "examples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")
    data = load_examples(options.data)
    if options.examples is not None:
        data = data.select(range(min(options.examples, len(data))))
    return data, {name: getattr(options, name) for name in ("max_length", "batch_size", "assistant_only")}


def _run(options: argparse.Namespace) -> None:
    from hf_fedlarge.budget import parse_bytes
    from hf_fedlarge.processor import computing_device, describe_device
    from hf_fedlarge.rounds import run_federation
    from hf_fedlarge.trainers.launch import LAUNCHERS

    config, output = _federation(options)
    given = {name: getattr(options, name) for name in ("launcher", "budget") if getattr(options, name) is not None}
    parse_bytes(given.get("budget", 0))
    config = config.model_copy(update=given)
    train = LAUNCHERS[config.launcher]()
    _report(describe_device(computing_device()))
    _print_run(run_federation(config, output, train, _report, stop=not options.no_stop), output)


def _serve(options: argparse.Namespace) -> None:
    from hf_fedlarge.serve import serve_federation

    config, output = _federation(options)
    how = {name: getattr(options, name) for name in ("poll", "patience", "key")} | {"stop": not options.no_stop}
    _print_run(serve_federation(config, output, options.store, _report_with_time, **how), output)


def _join(options: argparse.Namespace) -> None:
    from hf_fedlarge.processor import computing_device, describe_device
    from hf_fedlarge.trainers.join import join
    from hf_fedlarge.trainers.rehearsal import rehearse
    from hf_fedlarge.trainers.sites import Site

    hide_bars()
    for name in ("package", "show"):
        if (given := getattr(options, name)) and not options.check:
            raise ConfigError(f"--{name} {given} is for --check, which tries what a client would do; leave it out.")
    names = ("client", "data", "eval_data", "cache", "key", "keys", "server_key", "memory_budget", "result")
    brought = {name: getattr(options, name) for name in names}
    report = _report if options.check else _report_with_time
    report(describe_device(computing_device()))
    if options.check:
        rehearse(options.store, Site(**brought), report, options.package, options.show)
    else:
        how = {name: getattr(options, name) for name in ("once", "poll", "patience")}
        join(options.store, **brought, **how, report=report)


def _flower(options: argparse.Namespace) -> None:
    if options.action == "worker":
        parent = os.getppid()  # which may be gone when all is loaded
        from hf_fedlarge.flower.resident import serve

        hide_bars()
        serve(options.directory.expanduser(), _report, parent)
        return
    from hf_fedlarge.flower.new_app import write_app

    write_app(options.directory, options.store, options.checkpoint)
    print(f"{options.directory}: edit federation.yaml; docs/deployment.md has the commands that start it")


def _federation(options: argparse.Namespace) -> tuple[FederationConfig, Path]:
    """A federation's file, whose training arguments are found good, and its run directory."""
    from hf_fedlarge.config import load_federation
    from hf_fedlarge.trainers.launch import check_training

    config = load_federation(options.federation)
    check_training(config.training)
    hide_bars()
    return config, options.output or options.federation.parent / "run"


def _report(line: str) -> None:
    print(line, flush=True)


def _report_with_time(line: str) -> None:
    _report(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def _print_run(summary: dict[str, Any], output: Path) -> None:
    from hf_fedlarge.tables import print_summary

    print_summary(summary)
    print(f"\n{output / 'merged'} is the merged checkpoint; {output / 'summary.json'} has all figures.")


def _push(options: argparse.Namespace) -> None:
    from hf_fedlarge.hub import push

    how = {"private": not options.public, "summary": options.summary, "commit_message": options.message}
    print(push(options.directory, options.repo_id, **how))


def _keys(options: argparse.Namespace) -> None:
    from hf_fedlarge import keys

    if options.action == "new":
        print(keys.new_key(options.output / f"{options.name}.pem", options.name))
    elif options.action == "allow":
        key = keys.allow(options.list, " ".join(options.line))
        print(f"{options.list}: the key {key.fingerprint} is allowed")
    elif options.action == "revoke":
        for key in keys.revoke(options.list, options.name, options.key):
            print(f"{options.list}: the key {key.fingerprint} of {options.name} is revoked")
    else:
        for client, listed in sorted(keys.read_allowed(options.list).clients.items()):
            for key in listed:
                print(f"{client} {key.fingerprint} {key.state} since {key.since}")


if __name__ == "__main__":
    sys.exit(main())
