"""Attention over pages, by plain tensors on the device: one interface, several forms.

:data:`PagesAttention` says what a form is given and what it gives back. The plain form is the
reference; the kernel in Triton (:mod:`mor.ops.paged.kernel`) is imported only where it is chosen.
"""

from mor.ops.paged.flashinfer import FlashInfer, missing_flashinfer
from mor.ops.paged.plain import plain_attention
from mor.ops.paged.rows import Pages, PagesAttention, Rows
from mor.ops.paged.varlen import activate_flash, missing_flash, varlen_attention

__all__ = [
    "FlashInfer",
    "Pages",
    "PagesAttention",
    "Rows",
    "activate_flash",
    "missing_flash",
    "missing_flashinfer",
    "plain_attention",
    "varlen_attention",
]
