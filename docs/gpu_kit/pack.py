"""Pack the packages that a GPU machine without network lacks, in parts.

    python3 -m pip list --format freeze > have.txt          on the GPU machine
    make gpu-kit HAVE=have.txt PYTHON_THERE=3.12 ARCH=90    where packages can be downloaded
    eval "$(python3 kit/unpack.py ~/famt-site)"             on the GPU machine, with a copy of kit/

Downloads wheels of the project's dependencies for x86-64 Linux, except packages that the machine
has; removes unused files; writes parts, kit.json with their checksums, and unpack.py.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cubins import keep_architectures
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

_HERE = Path(__file__).parent
_PROJECT = _HERE.parents[1] / "pyproject.toml"
# Clusters, interactive reports, and DALI's dynamic mode and formats other than JPEG.
_WITHOUT = [
    "ray",
    "plotly",
    "libcst",
    "makefun",
    "nvtx",
    "nvidia-libnvcomp*",
    "nvidia-nvjpeg2k*",
    "nvidia-nvtiff*",
]
_PLATFORMS = [
    f"manylinux{glibc}_x86_64"
    for glibc in ["1", "2010", "2014", *(f"_2_{minor}" for minor in range(5, 40))]
]
# Headers, tests, type stubs, and the codecs whose libraries `_WITHOUT` names.
_UNUSED = [
    "nvidia/*/include/*",
    "nvidia/dali/test/*",
    "*/numcodecs/*/tests/*",
    "numcodecs/tests/*",
    "*.pyi",
    "nvidia/nvimgcodec/extensions/libnvjpeg2k_ext.so*",
    "nvidia/nvimgcodec/extensions/lib*tiff_ext.so*",
]
# Several wheels add to `nvidia`, and so may the machine.
_NAMESPACE = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"


def fetch(
    asked: Iterable[str], have: dict[str, str], without: list[str], python: str, into: Path
) -> None:
    """Download wheels of `asked` and of their requirements into a folder.

    Versions are those of this environment, with which the tests pass, or else the newest. A package
    in `have` (version by canonical name, "" for any) that satisfies a requirement is left out.
    Raises CalledProcessError if pip finds no wheel that satisfies all requirements of a package.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    wanted: dict[str, SpecifierSet] = {}
    seen: set[str] = set()
    queue = [Requirement(each) for each in asked]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if str(requirement) in seen or any(fnmatch(name, each) for each in without):
            continue
        seen.add(str(requirement))
        there = have.get(name)
        if there is not None and (not there or requirement.specifier.contains(there, True)):
            continue
        wanted[name] = wanted.get(name, _installed(name)) & requirement.specifier
        for wheel in _wheels(into, name):
            wheel.unlink()
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into)]
        command += ["--only-binary=:all:", "--implementation=cp", "--python-version", python]
        command += [f"--platform={each}" for each in _PLATFORMS]
        subprocess.run([*command, f"{name}{wanted[name]}"], check=True)
        (wheel,) = _wheels(into, name)
        print(wheel.name, flush=True)
        for each in map(Requirement, _metadata(wheel).get_all("Requires-Dist") or []):
            if each.marker is None or any(
                each.marker.evaluate(environment | {"extra": extra}) for extra in extras
            ):
                each.marker = None
                queue.append(each)


def _installed(name: str) -> SpecifierSet:
    try:
        return SpecifierSet(f"=={version(name)}")
    except PackageNotFoundError:
        return SpecifierSet()


def _wheels(folder: Path, name: str) -> list[Path]:
    wheels = folder.glob("*.whl")
    return [each for each in wheels if parse_wheel_filename(each.name)[0] == name]


def _metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(path).decode())


def install(wheels: Path, site: Path, python: str, keep: set[int]) -> None:
    """Unzip wheels into a folder, without scripts, unused files and code for other GPUs."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for data in site.glob("*.data"):
        for library in (each for each in (data / "purelib", data / "platlib") if each.is_dir()):
            shutil.copytree(library, site, dirs_exist_ok=True)
        shutil.rmtree(data)
    if (site / "nvidia").is_dir():
        (site / "nvidia" / "__init__.py").write_text(_NAMESPACE)
    ours = f".cpython-{python.replace('.', '')}-"
    for path in [each for each in site.rglob("*") if each.is_file()]:
        name = path.relative_to(site).as_posix()
        other = path.suffix == ".so" and ".cpython-" in path.name and ours not in path.name
        if other or any(fnmatch(name, each) for each in _UNUSED):
            path.unlink()
        elif ".so" in path.suffixes:
            _shrink(path, keep)


def _shrink(library: Path, keep: set[int]) -> None:
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", library], check=True)
    content = bytearray(library.read_bytes())
    if keep and keep_architectures(content, keep):
        library.write_bytes(content)


def write_parts(site: Path, out: Path, python: str, part_bytes: int) -> None:
    """Compress a folder and split it into parts of at most `part_bytes` bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part.*"):
        old.unlink()
    parts = {}
    with tempfile.TemporaryFile() as packed:
        filters = [
            {"id": lzma.FILTER_X86},
            {"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 128 << 20},
        ]
        with (
            lzma.open(packed, "wb", filters=filters) as compressed,
            tarfile.open(fileobj=compressed, mode="w|") as archive,
        ):
            archive.add(site, ".")
        packed.seek(0)
        while part := packed.read(part_bytes):
            name = f"part.{len(parts):03d}"
            (out / name).write_bytes(part)
            parts[name] = hashlib.sha256(part).hexdigest()
    (out / "kit.json").write_text(json.dumps({"python": python, "parts": parts}, indent=1))
    shutil.copy(_HERE / "unpack.py", out)


def main() -> None:
    """Pack according to the command line."""
    about, _, more = __doc__.partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=plain)
    option = parser.add_argument
    option("--have", type=Path, required=True, help="packages there, NAME or NAME==VERSION a line")
    option("--python", default="3.12", help="Python there (%(default)s)")
    option("--arch", type=int, nargs="*", default=[], help="GPU code to keep, 90 for H100; or all")
    option("--part-mib", type=int, default=1024, help="size of a part in MiB (%(default)s)")
    option("--also", nargs="*", default=[], help="further requirements, or left-out ones: ray")
    option("--without", nargs="*", default=_WITHOUT, help="patterns of names to leave out")
    option("--out", type=Path, default=Path("kit"), help="folder for the parts (%(default)s)")
    asked = parser.parse_args()
    if asked.part_mib < 1:
        parser.error("--part-mib must be at least 1")
    have = {}
    for line in asked.have.read_text().splitlines():
        name, _, version = line.split("#")[0].partition("==")
        have[canonicalize_name(name.strip())] = version.strip()
    also = {canonicalize_name(Requirement(each).name) for each in asked.also}
    without = [each for each in asked.without if each not in also]
    project = tomllib.loads(_PROJECT.read_text())["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as work:
        wheels, site = Path(work, "wheels"), Path(work, "site")
        fetch([*project, *asked.also], have, without, asked.python, wheels)
        install(wheels, site, asked.python, set(asked.arch))
        write_parts(site, asked.out, asked.python, asked.part_mib << 20)
    for path in sorted(asked.out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
