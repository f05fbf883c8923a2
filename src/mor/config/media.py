"""What follows from the fields of images and sounds: patches, frames, what the head has to give."""

from __future__ import annotations


class Media:
    """What follows from the fields of front end and head; a base of :class:`~mor.config.MoRConfig`.

    The names below are fields of the configuration.
    """

    modality: str
    head_type: str
    image_size: int | list[int] | None
    patch_size: int | list[int] | None
    num_channels: int
    stem_channels: list[int] | None
    stem_strides: list[int] | None
    num_mel_bins: int | None
    image_token_id: int | None
    audio_token_id: int | None
    conv_kernel: list[int]
    conv_stride: list[int]

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        (height, width), (tall, wide) = self.image_shape, self.patch_shape
        return height // tall, width // wide

    @property
    def num_patches(self) -> int:
        """Patches of an image, which are its tokens: row by row, left to right."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def stem_layers(self) -> list[tuple[int, int]]:
        """Channels and stride of each convolution before the map of patches; often none."""
        return list(zip(self.stem_channels or [], self.stem_strides or [], strict=True))

    @property
    def patch_width(self) -> int:
        """Numbers of a patch that the linear map reads: its pixels, or what the stem makes."""
        tall, wide = self.patch_shape
        return self.stem_channels[-1] if self.stem_channels else tall * wide * self.num_channels

    @property
    def media_token_id(self) -> int | None:
        """The token that stands for images or sounds in a text; None for a model of text alone."""
        return self.audio_token_id if self.image_token_id is None else self.image_token_id

    @property
    def input_width(self) -> int:
        """Numbers of a patch or of a frame, which a regression head predicts."""
        if self.modality == "image":
            tall, wide = self.patch_shape
            return tall * wide * self.num_channels
        return (self.num_mel_bins or 0) * self.frames_per_token

    @property
    def frames_per_token(self) -> int:
        """Frames by which the convolution steps from one token to the next."""
        stride = 1
        for one in self.conv_stride:
            stride *= one
        return stride

    def tokens_of_frames(self, frames: int) -> int:
        """Tokens that the convolution makes of so many frames."""
        for stride in self.conv_stride:
            frames = -(-frames // stride)
        return frames


def _pair(size: int | list[int] | None) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    assert size is not None
    return size[0], size[1]
