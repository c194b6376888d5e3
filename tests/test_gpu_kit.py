"""A kit for a GPU machine without network: packed, carried in parts, unpacked by Python alone."""

import importlib
import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[1] / "docs" / "gpu_kit"
HERE = "{}.{}".format(*sys.version_info)


@pytest.fixture
def load(monkeypatch):
    """Import a script as it would be run: its folder comes first."""
    monkeypatch.syspath_prepend(str(KIT))
    return importlib.import_module


@pytest.fixture
def kit(load, tmp_path):
    """Parts of 2,000 bytes that hold two modules."""
    site = tmp_path / "packed"
    (site / "carried").mkdir(parents=True)
    (site / "carried" / "__init__.py").write_text("from carried.noise import NOISE\n")
    noise = "".join(f"{(n * 2654435761) % 2**32:08x}" for n in range(2_000))
    (site / "carried" / "noise.py").write_text(f"NOISE = {noise!r}\n")
    load("pack").write_parts(site, tmp_path / "kit", HERE, part_bytes=2_000)
    return tmp_path / "kit"


def _unpack(kit, site):
    command = [sys.executable, "-I", kit / "unpack.py", site]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_shell_imports_what_the_parts_carried(kit, tmp_path):
    parts = sorted(kit.glob("part.*"))
    assert len(parts) > 2
    assert max(each.stat().st_size for each in parts) == 2_000
    site = tmp_path / "a site"
    line = f'eval "$({shlex.join([sys.executable, str(kit / "unpack.py"), str(site)])})"'
    command = f"{line} && {sys.executable} -c 'import carried; print(carried.__file__)'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(site)
    assert list(site.rglob("*.pyc"))


def test_a_second_unpacking_leaves_the_folder_as_it_is_and_another_kit_replaces_it(kit, tmp_path):
    site = tmp_path / "site"
    assert _unpack(kit, site).returncode == 0
    (site / "mine").touch()
    assert _unpack(kit, site).returncode == 0
    assert (site / "mine").exists()
    (kit / "kit.json").write_text((kit / "kit.json").read_text() + "\n")
    assert _unpack(kit, site).returncode == 0
    assert not (site / "mine").exists()


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_part_is_named_and_nothing_is_unpacked(kit, tmp_path, damage):
    part = kit / "part.001"
    part.write_bytes(part.read_bytes()[:-1])
    if damage == "missing":
        part.unlink()
    done = _unpack(kit, tmp_path / "site")
    assert done.returncode == 1
    assert f"{part} is missing or damaged" in done.stderr
    assert not (tmp_path / "site").exists()


def test_a_kit_of_another_python_and_a_folder_of_other_files_are_refused(kit, tmp_path):
    (tmp_path / "mine").mkdir()
    assert "holds no kit" in _unpack(kit, tmp_path / "mine").stderr
    content = json.loads((kit / "kit.json").read_text()) | {"python": "3.5"}
    (kit / "kit.json").write_text(json.dumps(content))
    assert "is for Python 3.5" in _unpack(kit, tmp_path / "site").stderr


def _container(*entries):
    """GPU code as nvcc stores it: (architecture, payload) each."""
    body = b""
    for architecture, payload in entries:
        head = struct.pack("<HHIQ", 2, 0x101, 64, len(payload))
        body += head.ljust(28, b"\1") + struct.pack("<I", architecture) + bytes(32) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _library(code):
    """A 64-bit ELF file of two sections, one with their names and one with GPU code."""
    names = b"\0.names\0.nv_fatbin\0"
    start = 64 + len(names)
    heads = b""
    for name, at, size in [(1, 64, len(names)), (8, start, len(code))]:
        heads += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0)
    head = b"\x7fELF\x02\x01\x01".ljust(40, b"\0") + struct.pack("<Q", start + len(code))
    head += struct.pack("<IHHHHHH", 0, 64, 0, 0, 64, 2, 0)
    return bytearray(head + names + code + heads)


@pytest.mark.parametrize(("keep", "left"), [({90}, b"b" * 16), ({80, 90}, b"a" * 24 + b"b" * 16)])
def test_only_code_of_the_architectures_to_keep_is_left(load, keep, left):
    many = _container((80, b"a" * 24), (90, b"b" * 16), (100, b"c" * 40))
    alone = _container((75, b"d" * 8))  # the driver has to make do with it
    library = _library(many + bytes(8) + alone)
    size, zeroed = len(library), load("cubins").keep_architectures(library, keep)
    assert len(library) == size
    assert zeroed == 80 - len(left)
    blank = b"".join(
        bytes(len(each)) if each not in left else each for each in [b"a" * 24, b"b" * 16, b"c" * 40]
    )
    payloads = [(80, blank[:24]), (90, blank[24:40]), (100, blank[40:])]
    assert library == _library(_container(*payloads) + bytes(8) + alone)


def test_a_library_without_gpu_code_is_left_and_an_unknown_layout_is_refused(load):
    keep = load("cubins").keep_architectures
    for plain in (_library(b"code"), bytearray(b"no library")):
        before = bytes(plain)
        assert keep(plain, {90}) == 0
        assert plain == before
    odd = bytearray(_container((80, b"a" * 24)))
    odd[24:32] = struct.pack("<Q", 20)  # shorter than the container
    with pytest.raises(ValueError, match="unknown layout"):
        keep(_library(bytes(odd)), {90})


def test_a_machines_packages_spare_theirs_and_what_they_require(load, tmp_path):
    have = {"zarr": "", "torch": "2.11.0+cu130"}
    load("pack").fetch(["zarr>=3", "torch>=2.6", "Ray[default]"], have, ["ray"], HERE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_packed_where_it_is_asked_for(load, tmp_path, monkeypatch):
    pack, left_out = load("pack"), []
    monkeypatch.setattr(pack, "fetch", lambda asked, have, without, *_: left_out.extend(without))
    monkeypatch.setattr(pack, "install", lambda wheels, site, *_: site.mkdir())
    (tmp_path / "have.txt").touch()
    options = ["--have", tmp_path / "have.txt", "--also", "pytest", "ray[default]"]
    monkeypatch.setattr(sys, "argv", ["pack.py", *map(str, options), "--out", str(tmp_path)])
    pack.main()
    assert "plotly" in left_out
    assert "ray" not in left_out


@pytest.mark.slow  # downloads
def test_wheels_are_fetched_with_what_they_require_and_installed(load, tmp_path):
    pack = load("pack")
    have = {"numpy": "2.0", "packaging": "", "typing-extensions": "4.1"}
    pack.fetch(["zarr>=3"], have, ["numcodecs"], HERE, tmp_path / "wheels")
    pack.install(tmp_path / "wheels", tmp_path / "site", HERE, {90})
    names = {
        each.name for each in (tmp_path / "site").glob("[a-z]*") if each.suffix != ".dist-info"
    }
    assert {"zarr", "donfig", "google_crc32c"} <= names
    assert "typing_extensions.py" in names  # the machine's is too old
    assert names.isdisjoint({"numpy", "packaging", "numcodecs"})
