"""Programs of the distribution: the installed one is taken; what cannot be had is told by its reason."""

import shutil

import pytest

from tools import debian


@pytest.fixture
def only(tmp_path, monkeypatch):
    """only(name=script, ...): these programs, and those that the scripts need, are all there are."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(debian, "PLACES", str(tmp_path))
    monkeypatch.setattr(
        debian.shutil, "which", lambda name, path=None, which=shutil.which: which(name, path=str(tmp_path))
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(**scripts):
        for name, script in scripts.items():
            file = tmp_path / name.replace("_", "-")
            file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            file.chmod(0o755)

    return make


def test_the_installed_program_is_taken(only, tmp_path):
    only(nginx="")
    assert debian.program("nginx", "nginx") == tmp_path / "nginx"


def test_elsewhere_it_says_that_this_is_no_debian(only):
    with pytest.raises(debian.NotToBeHad, match="nginx is not installed, and this is no Debian or Ubuntu"):
        debian.program("nginx", "nginx")


def test_it_says_what_apt_get_said_and_leaves_nothing_that_looks_complete(only):
    only(apt_get="echo 'E: no network' >&2; exit 100", dpkg="")
    for _ in range(2):
        with pytest.raises(debian.NotToBeHad, match=r"apt-get .*update: E: no network"):
            debian.program("nginx", "nginx")


def test_it_is_unpacked_once(only, tmp_path):
    only(
        apt_get=f'echo "$*" >> {tmp_path}/called; touch nginx.deb',
        dpkg='mkdir -p "$3/usr/sbin"; touch "$3/usr/sbin/nginx"',
    )
    found = debian.program("nginx", "nginx")
    assert (
        found == debian.program("nginx", "nginx") == tmp_path / "work" / "debian" / "nginx" / "usr" / "sbin" / "nginx"
    )
    assert len((tmp_path / "called").read_text("utf-8").splitlines()) == 2  # update, download
    with pytest.raises(debian.NotToBeHad, match="has no program other"):
        debian.program("nginx", "other")


def test_whole_is_with_what_the_system_lacks(only, tmp_path):
    only(
        apt_get=f"""echo "$*" >> {tmp_path}/called
case "$*" in *--simulate*) printf 'Inst libnss3 (2)\\nInst chromium (1)\\nConf chromium (1)\\n';; esac
touch a.deb b.deb""",
        dpkg='mkdir -p "$3/usr/lib"; touch "$3/usr/lib/$(basename "$2")"',
    )
    folder = debian.unpacked("chromium", whole=True)
    assert sorted(file.name for file in (folder / "usr/lib").iterdir()) == ["a.deb", "b.deb"]
    assert (tmp_path / "called").read_text("utf-8").splitlines()[-1].endswith("download libnss3 chromium")
