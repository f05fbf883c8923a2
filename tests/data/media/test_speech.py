"""`spoken-digits`: speakers held out whole, noise as loud as asked, the program and its faults."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mor.data.media import speech
from mor.data.media.speech import add_noise, find_program, read_spoken_digits, say
from mor.data.media.splits import Fractions
from mor.data.packages import WheelTags
from mor.errors import MorError

soundfile = pytest.importorskip("soundfile")


def wav(hertz: float) -> bytes:
    held = io.BytesIO()
    times = np.arange(1_600) / 16_000
    rising = np.sin(2 * np.pi * hertz * times * (1 + times)) / 2
    soundfile.write(held, rising, 16_000, format="WAV")
    return held.getvalue()


def test_speakers_are_held_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []

    def fake(word: str, voice: str, speed: int, pitch: int, *rest: object) -> bytes:
        said.append((voice, word))
        assert 110 <= speed < 230
        assert 20 <= pitch < 80
        return wav(200 + 50 * speech.WORDS.index(word))

    monkeypatch.setattr(speech, "say", fake)
    monkeypatch.setattr(speech, "find_program", lambda: (Path("x"), {}))
    monkeypatch.setattr(speech, "ACCENTS", ["en-us", "en-gb"])
    monkeypatch.setattr(speech, "VOICES", ["m1", "f1", "f2"])
    monkeypatch.setattr(speech, "TAKES", 1)
    gathered = read_spoken_digits(Fractions(1 / 6, 1 / 3, 3))
    counts = {name: len(examples.labels) for name, examples in gathered.splits.items()}
    assert counts == {"train": 30, "validation": 10, "test": 20}
    assert len({voice for voice, _ in said}) == 6
    assert gathered.splits["test"].labels[:10] == list(range(10))
    assert all(v.shape == (8, 40) for e in gathered.splits.values() for v in e.values)
    assert "Speech2Text" in gathered.extras["preprocessor_config.json"]


def test_noise_is_as_loud_as_asked() -> None:
    draw = np.random.default_rng(0)
    voice = np.sin(np.arange(20_000) / 7).astype(np.float32)
    for decibels in (5.0, 30.0):
        noise = add_noise(voice, decibels, draw) - voice
        ratio = 10 * np.log10((voice**2).mean() / (noise**2).mean())
        assert ratio == pytest.approx(decibels, abs=0.01)


def script(path: Path, content: str) -> Path:
    path.write_text(f"#!/bin/sh\n{content}\n", "utf-8")
    path.chmod(0o755)
    return path


def test_the_program_is_called_and_its_faults_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = script(tmp_path / "espeak-ng", 'echo "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program, environment = find_program()
    assert program == there
    told = say("seven", "en-us+f1", 160, 50, program, environment)
    assert told.decode().split() == ["-v", "en-us+f1", "-s", "160", "-p", "50", "--stdout", "seven"]
    script(there, "echo 'no such voice' >&2; exit 1")
    with pytest.raises(MorError, match=r"-v en-us failed: no such voice; install espeak-ng"):
        say("seven", "en-us", 160, 50, program, environment)
    with pytest.raises(MorError, match="cannot run"):
        say("seven", "en-us", 160, 50, tmp_path / "gone", environment)


def test_debian_packages_are_unpacked_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name in (
            "./usr/bin/espeak-ng",
            "./usr/lib/x86_64-linux-gnu/libespeak-ng.so.1.1.51",
            "./usr/lib/x86_64-linux-gnu/espeak-ng-data/voices/!v/f1",
            "./usr/share/doc/espeak-ng/copyright",
        ):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
    (tmp_path / "all.tar.gz").write_bytes(held.getvalue())
    monkeypatch.setenv("MOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    monkeypatch.setattr(speech, "fetch_deb", lambda name: tmp_path / "all.tar.gz")
    program, environment = find_program()
    folder = tmp_path / "cache" / "espeak-ng"
    assert program == folder / "espeak-ng"
    assert program.stat().st_mode & 0o111
    assert environment["ESPEAK_DATA_PATH"] == environment["LD_LIBRARY_PATH"] == str(folder)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert found == ["espeak-ng", "espeak-ng-data/voices/!v/f1", "libespeak-ng.so.1"]


def test_wheels_of_one_platform_are_named_as_pip_names_them() -> None:
    tags = WheelTags("cp312", "manylinux2014_x86_64.manylinux_2_17_x86_64")
    assert tags.file == "cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64"
    assert "--python-version=312" in tags.options()
    assert [one for one in tags.options() if one.startswith("--platform")] == [
        "--platform=manylinux2014_x86_64",
        "--platform=manylinux_2_17_x86_64",
    ]
