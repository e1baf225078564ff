"""The stages as functions, by the names of the commands.

    from hf_fedlarge import api
    from hf_fedlarge.config import PackageSettings

    settings = PackageSettings(keep_layers=0.75)
    api.shrink(api.plan_shrink(checkpoint, settings), settings, package)

They have a module of their own because `hf_fedlarge.shrink` and `hf_fedlarge.merge` are modules. Importing it loads
torch, transformers and trl.
"""

from hf_fedlarge.calibrate import make_package as shrink
from hf_fedlarge.calibrate import plan_package as plan_shrink
from hf_fedlarge.collect import aggregate_updates as aggregate
from hf_fedlarge.evaluation import evaluate
from hf_fedlarge.export import export_adapter as export
from hf_fedlarge.generate import generate
from hf_fedlarge.hub import push
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.merge import merge, plan_merge
from hf_fedlarge.package import load_package, load_tokenizer, save_adapter
from hf_fedlarge.relay import relay_update as relay
from hf_fedlarge.rounds import run_federation as run
from hf_fedlarge.serve import serve_federation as serve
from hf_fedlarge.trainers.client import train_client as train
from hf_fedlarge.trainers.join import join
from hf_fedlarge.transfer import transfer_report as transfer

__all__ = [
    "aggregate",
    "evaluate",
    "export",
    "generate",
    "join",
    "load_package",
    "load_tokenizer",
    "merge",
    "plan_merge",
    "plan_shrink",
    "push",
    "relay",
    "run",
    "save_adapter",
    "serve",
    "shrink",
    "start_adapter",
    "train",
    "transfer",
]
