"""Images and sounds in, batches out: decoding with limits, prepared folders, datasets.

    index = prepare_media("digits", "data/digits")
    train = MediaDataset("data/digits", "train")
    loader = DataLoader(train, batch_size=64, shuffle=True, collate_fn=collate_media)

A prepared folder holds an index and one safetensors file per split (`mor.data.media.index`), so
that a model of images or of sounds trains on it as one of text trains on token shards.
"""

from mor.data.media.dataset import MediaDataset, collate_media
from mor.data.media.index import IMAGES, SOUNDS, MediaIndex
from mor.data.media.prepare import MEDIA_SOURCES, MediaOptions, prepare_media

__all__ = [
    "prepare_media",
    "MediaOptions",
    "MEDIA_SOURCES",
    "MediaDataset",
    "collate_media",
    "MediaIndex",
    "IMAGES",
    "SOUNDS",
]
