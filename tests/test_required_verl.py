"""REQUIRED_VERL.txt by the rules of the installer of verl's recipe collection (install_verl.sh there)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The fields that the installer reads, by mode; of any other mode it says that it does not know it
FIELDS = {
    "rolling": ["VERL_COMMIT", "PIP_INSTALL"],
    "pinned_tag": ["TAG", "COMMIT", "PIP_INSTALL"],
    "pinned_commit": ["COMMIT", "PIP_INSTALL"],
    "reproduction_commit": ["REPRODUCTION_COMMIT", "ROLLING_VERL_COMMIT", "PIP_INSTALL"],
    "mixed": ["OPTION_A_TAG", "OPTION_A_COMMIT", "OPTION_A_PIP", "OPTION_B_VERL_COMMIT", "OPTION_B_PIP_INSTALL"],
    "rolling_with_baseline": ["ROLLING_VERL_COMMIT", "ROLLING_PIP_INSTALL", "REFERENCE_TAG", "REFERENCE_COMMIT"],
}


def read_fields(text: str) -> dict[str, str]:
    """KEY=VALUE lines as the installer's awk reads them: the first of a key counts, lines with # in front do not."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if line.lstrip().startswith("#") or "=" not in line:
            continue
        key, value = line.lstrip().split("=", 1)
        fields.setdefault(key, value.rstrip())
    return fields


@pytest.fixture
def fields() -> dict[str, str]:
    return read_fields((ROOT / "REQUIRED_VERL.txt").read_text())


def test_the_installer_knows_the_mode_and_finds_its_fields(fields):
    assert fields["MODE"] in FIELDS
    assert [name for name in FIELDS[fields["MODE"]] if not fields.get(name)] == []
    assert fields["UPSTREAM"].endswith(".git")
    assert fields["PIP_INSTALL"].startswith("pip install ")  # the installer puts the pip at hand in its place


def test_it_is_the_version_that_the_package_and_the_constraints_pin(fields):
    version = fields["TAG"].removeprefix("v")
    train = re.search(r"^train = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert f'"verl=={version}"' in train
    for name, pin in re.findall(r'"([\w-]+)==([\w.]+)"', train):
        assert re.search(rf"\b{name}(\[\w+\])?=={re.escape(pin)}", fields["PIP_INSTALL"])
    for profile in ("cpu", "gpu"):
        assert f"verl=={version}" in (ROOT / "constraints" / f"{profile}.txt").read_text().splitlines()


def test_the_readme_links_it():
    readme = (ROOT / "README.md").read_text()
    _, section = readme.split("## Required `verl` version\n", 1)
    assert "](REQUIRED_VERL.txt)" in section.split("\n## ")[0]


@pytest.mark.parametrize("line", ["MODE=pinned_tag", "  MODE=pinned_tag  ", "# MODE=x\nMODE=pinned_tag\nMODE=y"])
def test_lines_are_read_as_the_installer_reads_them(line):
    assert read_fields(line) == {"MODE": "pinned_tag"}
