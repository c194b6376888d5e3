"""What the documents show must exist and parse."""

import dataclasses
import re
import typing
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from famt.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


def test_rays_own_check_accepts_the_example_cluster():
    validate_config(prepare_config(yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text())))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_module_that_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\b((?:jobs|docs)/\w+\.(?:py|png|yaml|md))\b", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m ((?:train|jobs)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_gap_left_to_fill(page):
    assert not re.findall(r"^[A-Z_]{4,}$", (ROOT / page).read_text(), re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_in_a_command_is_known_to_its_program(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for word, arguments in re.findall(r"\bfamt ([a-z-]+)((?: +[^\n`]*)?)", text):
        if word not in COMMANDS or not COMMANDS[word].options:
            continue
        kinds = resolve_name(f"famt.{COMMANDS[word].options}")
        known = {
            field.name.replace("_", "-")
            for kind in typing.get_args(kinds) or [kinds]
            for field in dataclasses.fields(getattr(kind, "__origin__", kind))
        }
        for option in re.findall(r"--([a-z][a-z-]*)\b(?!\.)", arguments):
            assert option.removeprefix("no-") in known | {"help", "help-all"}, (word, option)
