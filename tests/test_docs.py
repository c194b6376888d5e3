"""What the documents show must exist and parse."""

import dataclasses
import re
import subprocess
import sys
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
    for path in re.findall(r"(?<![\w/])((?:docs|famt|jobs|pipeline|train)/[\w/]+\.[\w.]*\w)", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m ((?:train|jobs)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def _anchors(page):
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.S)
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.slow
def test_the_pages_build_as_a_site(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml"]
    done = subprocess.run([*command, "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.replace("README", "docs/index") for page in PAGES}
    assert {page.removeprefix("docs/").removesuffix(".md") for page in pages} <= {
        "index", *(path.parent.name for path in tmp_path.glob("*/index.html"))
    }  # fmt: skip


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
