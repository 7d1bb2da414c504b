"""Colours that look otherwise here than they should, by the code points of ITU-T H.273."""

from __future__ import annotations

PQ, HLG = 16, 18
# What is BT.709's, BT.601's, sRGB's or nearly so, and what isn't said.
USUAL_PRIMARIES = {0, 1, 2, 3, 5, 6, 7, 22}
USUAL_TRANSFERS = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15}


def is_high_range(transfer: int) -> bool:
    """Whether a transfer function is one of HDR."""
    return transfer in (PQ, HLG)


def colour_remark(primaries: int, transfer: int) -> str:
    """A sentence without the file's name at its beginning, empty where the colours look as they should."""
    if is_high_range(transfer):
        return "has HDR colours, which look pale here: convert it to SDR first if that matters."
    if transfer not in USUAL_TRANSFERS:
        return (
            "has linear or logarithmic brightness, which looks too dark or too pale here: convert it to BT.709 first "
            "if that matters."
        )
    if primaries not in USUAL_PRIMARIES:
        return "has wide-gamut colours, which look pale here: convert it to BT.709 first if that matters."
    return ""
