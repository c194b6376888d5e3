"""What a wheel holds: all packages, under the one name."""

import os
import subprocess
import sys
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
    assert set(declared["packages"]) == found | {"famt.train.recipes"}  # which holds no code
    for package, patterns in declared["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        assert all(list(folder.glob(each)) for each in patterns)


def test_the_template_of_reports_is_found_in_a_folder_with_packages_of_the_same_names(tmp_path):
    for name in ("train", "jobs", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not of this project')")
    code = "from famt.train import report; report._template()"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
