"""The house: arrows that point one way, files for one sitting, settings that have a place.

    scripts -> study, models, data, metrics -> lab
"""

import ast
import dataclasses
import graphlib
import inspect
from pathlib import Path

import pytest

import models
import study
import train_cls
import train_seg
from lab import cli

REPO = Path(__file__).parents[1]
LAB = {path.stem: path for path in (REPO / "lab").glob("*.py")}
TOP = {path.stem: path for path in REPO.glob("*.py")}
STUDIED = {"models", "data", "metrics"}
SCRIPTS = TOP.keys() - STUDIED - {"study"}
PYTHON = [*TOP.values(), *LAB.values(), *(REPO / "tests").glob("*.py")]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it: `lab.files`, not `lab` alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lab":
            found |= {f"lab.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_nothing_in_lab_imports_the_top_level():
    assert len(LAB) > 8 and {"train_cls", "train_seg", "interpret", "export", "predict"} <= SCRIPTS
    for path in LAB.values():
        assert not imported(path) & TOP.keys(), path


def test_no_script_imports_a_script_and_nothing_below_the_study_imports_it():
    for name, path in TOP.items():
        assert not imported(path) & SCRIPTS, path
        assert name not in STUDIED or "study" not in imported(path), path


def test_no_circle_of_imports_inside_lab():
    arrows = {f"lab.{name}": {module for module in imported(path) if module.startswith("lab.")}
              for name, path in LAB.items()}
    order = list(graphlib.TopologicalSorter(arrows).static_order())
    assert order.index("lab.files") < order.index("lab.cli") < order.index("lab.engine")


@pytest.mark.parametrize("config", [train_cls.Config, train_seg.Config])
def test_every_setting_is_local_shared_by_a_tables_rows_or_a_switch(config):
    """One that is neither would let rows of one table differ in it, and nothing would say so."""
    networks = {name for family in models.FAMILIES.values()
                for name in inspect.signature(family).parameters} - {"channels", "classes"}
    switches = networks | {"arch", "loss", "composites", "tie", "frozen"}
    names = {setting.name for setting in dataclasses.fields(config)}
    kinds = [cli.local(config), set(study.SHARED), switches, {"seed"}]
    assert {name: sum(name in kind for kind in kinds) for name in names} == dict.fromkeys(names, 1)


def test_what_rows_share_are_settings():
    fields = (*dataclasses.fields(train_cls.Config), *dataclasses.fields(train_seg.Config))
    assert set(study.SHARED) <= {setting.name for setting in fields}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(REPO)))
def test_a_file_has_at_most_400_lines_of_100_characters(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400 and max(map(len, lines), default=0) <= 100
