"""What the documents show must exist and parse."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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
    known = defaultdict(str)
    for path in [*ROOT.glob("jobs/**/*.py"), *ROOT.glob("train/**/*.py")]:
        programs = {
            "benchmarks": "benchmark",
            "evaluate": "evaluate",
            "config": "pretrain",
            "refresh_workers": "refresh_scores",
        }
        program = programs.get(path.parent.name) or programs.get(path.stem, path.stem)
        known[program] += path.read_text()
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:jobs/|-m (?:train|jobs)\.)(\w+)(?:\.py)?((?: +[^\n`]*)?)", text)
    assert commands or page == "docs/decisions.md"
    for program, arguments in commands:
        for option in re.findall(r"--([a-z][a-z-]*)\b(?!\.)", arguments):
            name = option.replace("-", "_")
            assert re.search(rf"^    {name}: ", known[program], re.M), (program, option)
