"""The distribution's programs that tests use, such as nginx: the installed one, or unpacked into .work without root.

python -m tools.debian nginx prometheus/promtool
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common.course.settings import work_folder

PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where nginx stands, not all users look


class NotToBeHad(RuntimeError):
    """The program is neither installed nor to be had from the distribution; the message says why."""


def program(package: str, name: str) -> Path:
    """The program `name` of a Debian package. Raises NotToBeHad."""
    if found := shutil.which(name, path=PLACES):
        return Path(found)
    found = next((path for path in (unpacked(package) / "usr").glob(f"*bin/{name}")), None)
    if not found:
        raise NotToBeHad(f"The package {package} has no program {name}.")
    return found


def unpacked(package: str, whole: bool = False) -> Path:
    """The folder of an unpacked package; `whole`: with what it needs and the system lacks. Raises NotToBeHad."""
    folder = work_folder() / "debian" / package
    if not folder.exists():
        _unpack(package, folder, whole)
    return folder


def _unpack(package: str, folder: Path, whole: bool) -> None:
    """Download the package and unpack it. Lists of packages of our own: updating the system's takes root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NotToBeHad(f"{package} is not installed, and this is no Debian or Ubuntu, whose apt-get would bring it.")
    part = folder.with_name(f"{package}.part")
    shutil.rmtree(part, ignore_errors=True)
    for needed in ("lists/partial", "cache/archives/partial", "root"):
        (part / needed).mkdir(parents=True)
    options = [
        f"Dir::State::lists={part}/lists",
        f"Dir::Cache={part}/cache",
        "APT::Sandbox::User=",
        "Acquire::Retries=2",
    ]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]

    def run(*words: str) -> str:
        done = subprocess.run([*apt, *words], cwd=part, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise NotToBeHad(f"apt-get {' '.join(words[-2:])}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    run("update")
    wanted = [package]
    if whole:
        wanted = re.findall(r"^Inst (\S+)", run("--simulate", "--no-install-recommends", "install", package), re.M)
    run("download", *wanted)
    for file in part.glob("*.deb"):
        subprocess.run(["dpkg", "-x", file, part / "root"], check=True, timeout=60)
    (part / "root").rename(folder)
    shutil.rmtree(part)


def main() -> None:
    for wanted in sys.argv[1:]:
        package, _, name = wanted.partition("/")
        print(program(package, name or package))


if __name__ == "__main__":
    main()
