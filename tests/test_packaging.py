"""What a wheel holds: all rooms, under the one name."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_wheel_under_the_name_it_is_imported_by():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, names in os.walk(ROOT / "famt", followlinks=True)
        if "__init__.py" in names
    }
    assert set(declared["packages"]) == found
    for package, patterns in declared["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        assert all(list(folder.glob(each)) for each in patterns)
