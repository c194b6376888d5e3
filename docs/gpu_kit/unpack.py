"""Unpack a kit of `pack.py` on a GPU machine without network; needs Python alone.

    eval "$(python3 kit/unpack.py ~/famt-site)"

Checks all parts, unpacks them into the folder and prints the line that puts it on PYTHONPATH. A
folder that holds this kit already is left as it is.
"""

import compileall
import hashlib
import io
import json
import shlex
import shutil
import sys
import tarfile
from pathlib import Path


def unpack(kit: Path, site: Path) -> None:
    """Unpack the parts in `kit` into `site`; raises ValueError for a kit that does not fit."""
    wanted = (kit / "kit.json").read_text()
    mark = site / ".kit.json"
    if mark.exists() and mark.read_text() == wanted:
        return
    if site.exists() and not mark.exists():
        raise ValueError(f"{site} exists and holds no kit; name a new folder")
    content = json.loads(wanted)
    here = "{}.{}".format(*sys.version_info)
    if content["python"] != here:
        raise ValueError(f"{kit} is for Python {content['python']}, this is {here}; pack it anew")
    packed = io.BytesIO()
    for name, checksum in content["parts"].items():
        part = (kit / name).read_bytes() if (kit / name).exists() else b""
        if hashlib.sha256(part).hexdigest() != checksum:
            raise ValueError(f"{kit / name} is missing or damaged; copy it again")
        packed.write(part)
    packed.seek(0)
    new = site.with_name(site.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with tarfile.open(fileobj=packed, mode="r:xz") as archive:
        archive.extractall(new, filter="data")
    # A file that does not compile raises its error where it is imported.
    compileall.compile_dir(new, quiet=2, workers=0)
    (new / mark.name).write_text(wanted)
    if site.exists():
        shutil.rmtree(site)
    new.rename(site)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).absolute()
    try:
        unpack(Path(__file__).parent, folder)
    except (OSError, ValueError) as error:
        sys.exit(f"unpack.py: {error}")
    print(f'export PYTHONPATH={shlex.quote(str(folder))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
