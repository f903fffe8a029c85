"""The wheel holds the library with what the page is made of, its types, its dependencies and its commands."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from packaging.requirements import Requirement
from program import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    names = ("attn_cnn", "requirements")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", f"--wheel-dir={folder}", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


def read(wheel, name):
    return wheel.read(next(path for path in wheel.namelist() if path.endswith(name))).decode()


def test_every_file_of_the_library_is_in_it_and_nothing_else(wheel):
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "attn_cnn").rglob("*") if path.is_file()}
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert there == {name for name in here if "__pycache__" not in name}


def test_its_dependencies_are_those_of_the_requirements(wheel):
    of_wheel = {}
    for line in read(wheel, "METADATA").splitlines():
        if line.startswith("Requires-Dist: "):
            text, _, extra = line.removeprefix("Requires-Dist: ").partition("extra == ")
            of_wheel.setdefault(extra.strip("\"'") or "system", set()).add(
                Requirement(text.rstrip("; ").removesuffix(" and"))
            )
    assert set(of_wheel) == {"system", "data", "tests"}
    for name, found in of_wheel.items():
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        needed = {Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")}
        assert {(r.name, r.specifier) for r in found} == {(r.name, r.specifier) for r in needed}


def test_installed_alone_a_command_reads_maps_to_its_end(wheel, tmp_path):
    install = ["install", "--no-deps", "--quiet", f"--target={tmp_path}", wheel.filename]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    np.savez(tmp_path / "vit.npz", maps=np.full((1, 1, 2, 2, 2, 2), 0.25, np.float32))
    command = [tmp_path / "bin" / "attn-cnn-convolution", "recover", "--maps=vit.npz"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "layer 0, 2x2 grid" in done.stdout, done.stderr


def test_its_commands_exist(wheel):
    lines = [line for line in read(wheel, "entry_points.txt").splitlines() if "=" in line]
    assert len(lines) == 6
    for line in lines:
        module, _, function = line.partition(" = ")[2].partition(":")
        assert callable(getattr(importlib.import_module(module), function)), line
