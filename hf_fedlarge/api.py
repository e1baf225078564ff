"""The stages as functions, by the names of the commands.

    from hf_fedlarge import api
    from hf_fedlarge.config import PackageSettings

    settings = PackageSettings(keep_layers=0.75)
    plan = api.plan_package(checkpoint, settings)
    api.shrink(plan, package, complete=api.surrogates_for(plan, settings))

They have a module of their own because `hf_fedlarge.shrink` and `hf_fedlarge.merge` are modules. Importing it loads
torch, transformers and trl.
"""

from hf_fedlarge.calibrate import plan_package, surrogates_for
from hf_fedlarge.collect import aggregate_updates as aggregate
from hf_fedlarge.collect import start_adapter
from hf_fedlarge.evaluation import evaluate
from hf_fedlarge.hub import push
from hf_fedlarge.merge import merge, plan_merge
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.rounds import run_federation as run
from hf_fedlarge.shrink import plan_shrink, shrink
from hf_fedlarge.trainers.client import train_client as train

__all__ = [
    "aggregate",
    "evaluate",
    "load_package",
    "load_tokenizer",
    "merge",
    "plan_merge",
    "plan_package",
    "plan_shrink",
    "push",
    "run",
    "shrink",
    "start_adapter",
    "surrogates_for",
    "train",
]
