"""`mor data prepare` for images and sounds: from a source to a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mor.checks import check_choice, check_real, check_whole
from mor.data.media.errors import BadMedia
from mor.data.media.features import FrameSettings, frames_of, make_extractor
from mor.data.media.folders import LABEL_FIELD, LabelledFile, list_folder
from mor.data.media.images import ImageLimits, decode_image, resize_image
from mor.data.media.index import (
    IMAGES,
    INDEX_FILE,
    PREPROCESSOR_FILE,
    SKIPPED_FILE,
    SOUNDS,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    MediaIndex,
    is_media,
)
from mor.data.media.packaged import read_animals, read_digits, read_vowels
from mor.data.media.sounds import AudioLimits, decode_audio
from mor.data.media.speech import read_spoken_digits
from mor.data.media.splits import Fractions, drop_copies, split_off
from mor.data.media.writer import Examples, Gathered, write_media
from mor.data.progress import Progress, no_progress
from mor.data.reuse import differences
from mor.data.sources import files_digest
from mor.errors import MorError

PACKAGED: dict[str, Callable[[Fractions], Gathered]] = {
    "digits": read_digits,
    "animal-mnist": read_animals,
    "japanese-vowels": read_vowels,
    "spoken-digits": read_spoken_digits,
}
FOLDERS = (IMAGES, SOUNDS)
MEDIA_SOURCES = (*PACKAGED, *FOLDERS)


@dataclass(frozen=True)
class MediaOptions:
    """How files of a folder become examples, and what is held out.

    Attributes:
        validation_fraction, test_fraction: of each class, where the source has no such split.
        seed: which ones.
        height, width: in pixels, that every image is brought to.
        fit: `crop` cuts off what stands out, `squeeze` keeps all and not the proportions.
        channels: 3 for colours, 1 for grey.
        frames: how sounds become frames.
        max_seconds: a longer sound is refused.
        label_field: of the metadata.
        skip_bad: leave out files that give no image or sound, rather than raise at the first.
    """

    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0
    height: int = 32
    width: int = 32
    fit: Literal["crop", "squeeze"] = "crop"
    channels: int = 3
    frames: FrameSettings = field(default_factory=FrameSettings)
    max_seconds: float = 60.0
    label_field: str = LABEL_FIELD
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Raise `MorError` for a value out of range."""
        for name in ("validation_fraction", "test_fraction"):
            check_real(name, getattr(self, name), 0.0, 0.9)
        check_whole("seed", self.seed, 0)
        for name in ("height", "width"):
            check_whole(name, getattr(self, name), 1, 4096)
        check_choice("fit", self.fit, ("crop", "squeeze"))
        check_choice("channels", self.channels, (1, 3))
        check_real("max_seconds", self.max_seconds, 0.0, open_low=True)

    @property
    def fractions(self) -> Fractions:
        """What is held out."""
        return Fractions(self.validation_fraction, self.test_fraction, self.seed)


def is_media_source(source: str) -> bool:
    """Whether `source` names images or sounds rather than texts."""
    return source in MEDIA_SOURCES


def prepare_media(
    source: str,
    out: str | Path,
    *,
    folder: str | Path | None = None,
    options: MediaOptions | None = None,
    overwrite: bool = False,
    program: str = "",
    progress: Progress = no_progress,
) -> MediaIndex:
    """Prepare the images or sounds of a source in the folder `out`, whole or not at all.

    Exact copies are left out before anything is held out. A folder that holds this very
    preparation already is checked and returned with `reused` set.

    Args:
        source: `digits`, `animal-mnist`, `japanese-vowels`, `spoken-digits`, `images` or `audio`.
        out: the folder to make.
        folder: of files, for `images` and `audio`.
        options: how, and what is held out.
        overwrite: make it anew where `out` holds another preparation.
        program: who makes it, for the index.
        progress: called with the stage, the files done and their total.

    Raises:
        BadMedia: a file gives no image or sound, and `options.skip_bad` is not set.
        MorError: a wrong source, folder, option or output folder.
    """
    out, options = Path(out).expanduser(), options or MediaOptions()
    if not is_media_source(source):
        raise MorError(f"source {source!r} is not known; use one of: {', '.join(MEDIA_SOURCES)}")
    if (folder is not None) != (source in FOLDERS):
        use = f"give it: {source} DIR" if folder is None else "leave it out"
        raise MorError(f"source {source} {'needs' if folder is None else 'takes no'} folder; {use}")
    place = None if folder is None else Path(folder).expanduser()
    preparation: dict[str, Any] = {"source": source, "options": asdict(options)}
    if place is not None:
        listing = list_folder(place, source, options.label_field)
        names = [file.name for file in listing.files]
        preparation["files_sha256"] = files_digest(place, names)
    _check_target(out)
    if not overwrite and (out / INDEX_FILE).is_file():
        return _reuse(out, preparation)
    if place is None:
        gathered = PACKAGED[source](options.fractions)
    else:
        gathered = _read_folder(place, source, options, progress)
    return write_media(
        gathered,
        out,
        source=source if place is None else f"{source} {place.name}",
        preparation=preparation,
        program=program,
        overwrite=overwrite,
    )


def _read_folder(place: Path, kind: str, options: MediaOptions, progress: Progress) -> Gathered:
    listing = list_folder(place, kind, options.label_field)
    read, extras = _reader(kind, options)
    classes, skipped = listing.classes, list(listing.skipped)
    splits = {name: Examples() for name in SPLITS}
    read_files: dict[str, list[LabelledFile]] = {name: [] for name in SPLITS}
    for number, file in enumerate(listing.files):
        progress("reading files", number, len(listing.files))
        try:
            value = read((place / file.name).read_bytes())
        except (BadMedia, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            if not options.skip_bad:
                raise BadMedia(
                    f"{place / file.name}: {reason}; --skip-bad-rows leaves such files out"
                ) from error
            skipped.append({"file": file.name, "reason": reason})
            continue
        splits[file.split].add(value, classes.index(file.label))
        read_files[file.split].append(file)
    copies = drop_copies(splits)
    for split, at in copies:
        skipped.append({"file": read_files[split][at].name, "reason": "exact copy of another"})
    train, seed = splits[TRAIN], options.seed
    if TEST not in listing.splits:
        splits[TEST] = split_off(train, options.test_fraction, seed)
    if VALIDATION not in listing.splits:
        splits[VALIDATION] = split_off(train, options.validation_fraction, seed + 1)
    return Gathered(
        kind,
        classes,
        splits,
        normalise=kind == IMAGES,
        num_duplicates=len(copies),
        skipped=sorted(skipped, key=lambda one: one["file"]),
        extras=extras,
    )


def _reader(
    kind: str, options: MediaOptions
) -> tuple[Callable[[bytes], np.ndarray], dict[str, str]]:
    """What makes a file's bytes into an example, and further files for the prepared folder."""
    if kind == IMAGES:
        mode: Literal["RGB", "L"] = "RGB" if options.channels == 3 else "L"

        def read_image(data: bytes) -> np.ndarray:
            pixels = decode_image(data, ImageLimits(), mode)
            return resize_image(pixels, options.height, options.width, options.fit)

        return read_image, {}
    extractor = make_extractor(options.frames)
    limits = AudioLimits(max_seconds=options.max_seconds)

    def read_sound(data: bytes) -> np.ndarray:
        return frames_of(decode_audio(data, limits, options.frames.sampling_rate), extractor)

    return read_sound, {PREPROCESSOR_FILE: extractor.to_json_string()}


def _check_target(out: Path) -> None:
    """Let a missing, an empty or a prepared folder through: it may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise MorError(f"output {out} is a file, expected a folder")
    ours = {INDEX_FILE, SKIPPED_FILE, PREPROCESSOR_FILE, *(f"{s}.safetensors" for s in SPLITS)}
    foreign = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if foreign or (any(out.iterdir()) and not is_media(out)):
        what = foreign[0] if foreign else INDEX_FILE
        raise MorError(f"output folder {out} holds other things ({what}); choose a new folder")


def _reuse(out: Path, preparation: dict[str, Any]) -> MediaIndex:
    index = MediaIndex.load(out)
    if different := differences(index.preparation, preparation):
        raise MorError(
            f"{out} already holds another preparation ({different}); choose another folder, or "
            "overwrite it"
        )
    index.verify()
    return replace(index, reused=True)
