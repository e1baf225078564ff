"""Rules of the house that are easier to keep than to restore: who may import whom."""

import ast
from pathlib import Path

import pytest

from hf_fedlarge.config import (
    DataConfig,
    FederationConfig,
    LoraSettings,
    PrivacySettings,
    SecureSettings,
    TierSettings,
)

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "hf_fedlarge"

# Imports point down: a module may import those of the lines above its own.
LEVELS = [
    {"errors", "options"},
    {"records", "ciphers", "fixed_point", "budget", "directory", "memory", "patience", "cache"},
    {"coherence", "kernels"},
    {"config", "layers", "stdlib_corpus", "blocks", "untrusted", "positions", "processor"},
    {"ledger", "remote", "rerun"},
    {"entries", "summary"},
    {"artifacts"},
    {"digests"},
    {
        "tensors",
        "architectures",
        "quantize",
        "data",
        "partition",
        "cards",
        "plan",
        "journal",
        "keys",
        "store",
        "templates",
        "attention",
        "gated",
        "passes",
        "subspace",
    },
    {"packed"},
    {
        "experience",
        "checkpoints",
        "linear",
        "norm",
        "sequences",
        "hub",
        "products",
        "progress",
        "rounding",
        "gptq",
        "server_optimizer",
        "codec",
        "secagg",
    },
    {"arena", "loss"},
    {
        "walk",
        "corrections",
        "weighting",
        "adapters",
        "aggregate",
        "agreement",
        "surrogate",
        "neurons",
        "orders",
        "retention",
    },
    {"engine", "fit", "gradients", "robust", "wire", "voice"},
    {"shrink", "streaming", "client_state", "privacy", "admission"},
    {"feedback", "scaffold"},
    {"update"},
    {"package", "merge", "combine", "traffic", "report"},
    {"lineage", "export", "encoding"},
    {"collect", "evaluation", "server", "tiers", "choice", "widths"},
    {"heal"},
    {"calibrate", "transfer", "generate", "clients", "relay", "tables", "secure_sum"},
    {"tier_packages"},
    {"jobs"},
    {"rounds"},
    {"offers"},
    {"secure_serve"},
    {"serve"},
    {"api", "cli"},
]
LEVEL = {module: number for number, modules in enumerate(LEVELS) for module in modules}

# A library that only one module knows can be swapped by touching one file.
ONE_IMPORTER = {
    "bitsandbytes": {"quantize"},
    "peft": {"adapters"},
    "datasets": {"data"},
    "fsspec": {"directory", "remote"},
    "huggingface_hub": {"hub"},
    "pyarrow": {"data"},
    "cryptography": {"keys", "ciphers"},  # signatures, and all else
    "Crypto": {"ciphers"},
    "dp_accounting": {"privacy"},
}


def imported(path: Path, typing_only: bool = False) -> set[str]:
    """Dotted names that a file imports at run time, at any depth."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(path.stem for path in LIBRARY.glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_level():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in imported(LIBRARY / f"{module}.py"):
        parts = name.split(".")
        if parts[0] == "hf_fedlarge" and parts[1] in LEVEL:
            assert LEVEL[parts[1]] < LEVEL[module], f"{module} imports {parts[1]}"


# Flower's own, above the library and beside the command line; of all others only that may import them.
FLOWER = [{"letters", "new_app", "work"}, {"mailbox", "resident"}, {"client", "server"}]


def test_flower_is_known_to_its_own_modules_alone():
    level = {module: number for number, modules in enumerate(FLOWER) for module in modules}
    assert {path.stem for path in (LIBRARY / "flower").glob("*.py")} - {"__init__"} == set(level)
    for module in level:
        for name in imported(LIBRARY / "flower" / f"{module}.py"):
            assert not name.startswith(("hf_fedlarge.cli", "hf_fedlarge.scripts"))
            if name.startswith("hf_fedlarge.flower."):
                assert level[name.split(".")[2]] < level[module], f"flower/{module} imports {name}"
    outside = [*LIBRARY.glob("*.py"), *(ROOT / "trainers").glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for path in outside:
        for name in imported(path):
            assert name.split(".")[0] != "flwr", f"{path} imports flwr"
            assert not name.startswith("hf_fedlarge.flower") or path.name == "cli.py", f"{path} imports {name}"


FILES = {module: LIBRARY / f"{module}.py" for module in MODULES}
FILES |= {f"flower/{path.stem}": path for path in sorted((LIBRARY / "flower").glob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_each_library_has_one_importer(module):
    roots = {name.split(".")[0] for name in imported(FILES[module])}
    for library, importers in ONE_IMPORTER.items():
        assert library not in roots or module in importers, f"{module} imports {library}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"api", "cli"}))
def test_the_library_needs_neither_trainers_nor_scripts(module):
    for name in imported(LIBRARY / f"{module}.py"):
        assert not name.startswith(("hf_fedlarge.trainers", "hf_fedlarge.scripts")), name


@pytest.mark.parametrize("module", ["subspace", "products", "aggregate", "robust", "server_optimizer"])
def test_aggregation_is_tensor_functions_alone(module):
    allowed = {"torch", "collections", "typing", "__future__", "hf_fedlarge", "math", "statistics", "functools"}
    names = imported(LIBRARY / f"{module}.py")
    assert {name.split(".")[0] for name in names} <= allowed
    ours = {name.split(".")[1] for name in names if name.startswith("hf_fedlarge")}
    assert ours <= {"errors", "tensors", "products", "aggregate", "subspace"}


@pytest.mark.parametrize("path", sorted((ROOT / "trainers").glob("*.py")), ids=lambda path: path.name)
def test_no_file_beside_the_client_program_shadows_a_library(path):
    assert path.stem not in {"datasets", "evaluate", "accelerate", "transformers", "trl", "peft", "torch"}


def test_modules_stay_small():
    for folder in (LIBRARY, ROOT / "trainers", ROOT / "scripts"):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_every_module_is_on_the_list():
    listed = {line.split()[0] for line in (ROOT / "docs" / "modules.md").read_text().splitlines() if line.strip()}
    paths = [*LIBRARY.glob("*.py"), *(LIBRARY / "flower").glob("*.py"), *(ROOT / "trainers").glob("*.py")]
    assert {path.name for path in paths} - {"__init__.py"} <= listed


def test_every_setting_is_in_the_reference():
    text = (ROOT / "docs" / "configuration.md").read_text()
    models = (FederationConfig, DataConfig, LoraSettings, TierSettings, PrivacySettings, SecureSettings)
    assert [name for model in models for name in model.model_fields if f"`{name}`" not in text] == []
