"""What a user gets from the wheel: installed outside the checkout, every way to start it works."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    # From elsewhere and without PYTHONPATH, so that the checkout can't help.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=environment, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    output = tmp_path_factory.mktemp("wheel")
    result = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, ROOT)
    assert result.returncode == 0, result.stderr
    [path] = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are those of the environment that runs the tests."""
    path = tmp_path_factory.mktemp("installed")
    venv.create(path / "venv", with_pip=True)
    python = path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(path / "venv")}))
    # The dependencies, gigabytes of them, are lent; our own package must come from the wheel alone.
    lent = path / "lent"
    lent.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "fedlarge" not in entry.name.lower().replace("-", "_").replace("_", "") and entry.suffix != ".pth":
            (lent / entry.name).symlink_to(entry)
    (site / "lent.pth").write_text(f"{lent}\n")
    result = run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel)
    assert result.returncode == 0, result.stderr
    return python, path


def test_the_wheel_holds_the_library_and_nothing_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hf_fedlarge"}
    for name in (
        "hf_fedlarge/attention.c",
        "hf_fedlarge/bf16.h",
        "hf_fedlarge/kernels.c",
        "hf_fedlarge/flower/server.py",
        "hf_fedlarge/trainers/client.py",
        "hf_fedlarge/scripts/shrink.py",
        "hf_fedlarge/model_cards/checkpoint.md.jinja",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_python_started_in_a_clone_finds_all_of_it_although_another_copy_is_installed(installed):
    python, _ = installed
    script = """
import hf_fedlarge.api, hf_fedlarge.scripts, hf_fedlarge.trainers
from importlib.resources import files

print(files("hf_fedlarge.model_cards"))
"""
    result = run(python, "-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "model_cards"


@pytest.mark.parametrize(
    "command",
    [
        ["{bin}/hf-fedlarge", "--help"],
        ["{bin}/hf-fedlarge", "shrink", "--help"],
        ["{bin}/hf-fedlarge", "train", "--help"],
        ["{bin}/python", "-m", "accelerate.commands.launch", "--cpu", "-m", "hf_fedlarge.trainers.client", "--help"],
    ],
)
def test_the_installed_commands_start(installed, command):
    python, path = installed
    result = run(*(word.format(bin=python.parent) for word in command), cwd=path)
    assert result.returncode == 0, result.stderr
    assert "usage: hf-fedlarge" in result.stdout


def test_what_is_imported_is_the_wheel(installed):
    python, path = installed
    code = "import hf_fedlarge.trainers, hf_fedlarge.model_cards as m; print(hf_fedlarge.__file__, m.__file__)"
    result = run(python, "-c", code, cwd=path)
    assert result.returncode == 0, result.stderr
    assert str(ROOT) not in result.stdout
    assert result.stdout.count(str(path)) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("passive", "10000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
    ],
)
def test_how_threads_wait_is_set_unless_the_user_has(given, expected):
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    program = "import hf_fedlarge, os; print([os.environ.get(n) for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')])"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(list(expected))
