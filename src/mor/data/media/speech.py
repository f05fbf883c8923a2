"""`spoken-digits`: zero to nine, said by the speech synthesiser eSpeak NG, with noise.

90 speakers (six accents of English, fifteen voices), each saying each digit twice, at speeds and
pitches drawn from the seed, in noise of 5 to 30 dB below the voice. Whole speakers are held out.
The program `espeak-ng` is used where it is installed; on Debian and its like its packages are
fetched by apt-get else, and unpacked in the cache folder without being installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mor.data.english.archives import read_members
from mor.data.media.features import FrameSettings, frames_of, make_extractor
from mor.data.media.index import PREPROCESSOR_FILE, SOUNDS, TEST, TRAIN, VALIDATION
from mor.data.media.sounds import Sound, decode_audio
from mor.data.media.splits import Fractions
from mor.data.media.writer import Examples, Gathered
from mor.data.packages import cache_dir, fetch_deb
from mor.errors import MorError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ACCENTS = ["en-us", "en-gb", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan"]
VOICES = [*(f"m{n}" for n in range(1, 9)), *(f"f{n}" for n in range(1, 6)), "croak", "whisper"]
TAKES = 2
_PACKAGES = ("espeak-ng", "libespeak-ng1", "espeak-ng-data", "libpcaudio0", "libsonic0")
_FILES = r"usr/(?:bin/espeak-ng|lib/[^/]+/(lib[^/]+\.so\.\d+)[^/]*|lib/[^/]+/(espeak-ng-data/.+))"
_INSTEAD = "install espeak-ng, such as by `apt-get install espeak-ng`"


def read_spoken_digits(fractions: Fractions) -> Gathered:
    """Log-mel frames, float32 [length, 40], of 1,800 spoken digits.

    Raises:
        MorError: espeak-ng is not there and cannot be fetched, or fails.
    """
    program, environment = find_program()
    draw = np.random.default_rng(fractions.seed)
    speakers = [f"{accent}+{voice}" for accent in ACCENTS for voice in VOICES]
    order = [speakers[place] for place in draw.permutation(len(speakers))]
    tests = round(fractions.test * len(order))
    validations = round(fractions.validation * len(order))
    extractor = make_extractor(FrameSettings())
    splits = {name: Examples() for name in (TRAIN, VALIDATION, TEST)}
    for place, speaker in enumerate(order):
        late = VALIDATION if place < tests + validations else TRAIN
        examples = splits[TEST if place < tests else late]
        for digit, word in enumerate(WORDS):
            for _ in range(TAKES):
                speed, pitch = int(draw.integers(110, 230)), int(draw.integers(20, 80))
                said = say(word, speaker, speed, pitch, program, environment)
                sound = decode_audio(said, sampling_rate=extractor.sampling_rate)
                noisy = add_noise(sound.samples, float(draw.uniform(5.0, 30.0)), draw)
                examples.add(frames_of(Sound(noisy, sound.sampling_rate), extractor), digit)
    licence = "made by eSpeak NG (GPL-3.0-or-later), whose licence does not reach what it says"
    extras = {PREPROCESSOR_FILE: extractor.to_json_string()}
    return Gathered(SOUNDS, WORDS, splits, normalise=False, licence=licence, extras=extras)


def say(
    word: str, voice: str, speed: int, pitch: int, program: Path, environment: Mapping[str, str]
) -> bytes:
    """A WAV file of a word; `speed` in words a minute, `pitch` from 0 to 99.

    Raises:
        MorError: the program fails.
    """
    command = [str(program), "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    try:
        made = subprocess.run(command, env=dict(environment), capture_output=True, check=False)
    except OSError as error:
        raise MorError(f"cannot run {program}: {error}; {_INSTEAD}") from error
    if made.returncode or not made.stdout:
        told = made.stderr.decode("utf-8", "replace").strip().splitlines()
        raise MorError(
            f"{program} -v {voice} failed: {told[-1] if told else 'it made no sound'}; {_INSTEAD}"
        )
    return made.stdout


def add_noise(samples: np.ndarray, decibels: float, draw: np.random.Generator) -> np.ndarray:
    """Samples with noise so many decibels below their own power; deep noise is louder (1/f)."""
    size = len(samples)
    spectrum = np.fft.rfft(draw.standard_normal(size))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0))
    noise = np.fft.irfft(spectrum, size)
    power = float(np.mean(samples.astype(np.float64) ** 2))
    loud = np.sqrt(power / 10 ** (decibels / 10) / max(float(np.mean(noise**2)), 1e-20))
    return (samples + loud * noise).astype(np.float32)


def find_program() -> tuple[Path, dict[str, str]]:
    """The program espeak-ng, and the environment to run it in.

    Raises:
        MorError: it is not installed, and its Debian packages cannot be fetched.
    """
    installed = shutil.which("espeak-ng")
    if installed:
        return Path(installed), dict(os.environ)
    folder = cache_dir() / "espeak-ng"
    program = folder / "espeak-ng"
    if not program.is_file():
        try:
            _unpack(folder)
        except MorError as error:
            raise MorError(f"spoken digits need espeak-ng: {error}; or {_INSTEAD}") from error
    there = {"LD_LIBRARY_PATH": str(folder), "ESPEAK_DATA_PATH": str(folder)}
    return program, dict(os.environ) | there


def _unpack(folder: Path) -> None:
    """Put the program, its libraries under their short names, and its voices into a folder."""
    program = b""
    for package in _PACKAGES:
        for match, content in read_members(fetch_deb(package), _FILES):
            library, data = match.groups()
            if not library and not data:
                program = content
                continue
            path = folder / (library or data)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    # Last, since where it is, all is.
    fresh = folder / "espeak-ng.partial"
    fresh.write_bytes(program)
    fresh.chmod(0o755)
    os.replace(fresh, folder / "espeak-ng")
