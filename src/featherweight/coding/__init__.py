"""The `.fw` container: declared codes first, values second; entropy coders; reading back without running code."""

from featherweight.coding.container import SaveReport, load, save, unpack, unpack_codes
from featherweight.coding.inspection import inspect
from featherweight.coding.packing import pack_tensor
from featherweight.coding.transit import Codec, Packed, codec
from featherweight.coding.unpacking import unpack_tensor

__all__ = [
    "Codec",
    "Packed",
    "SaveReport",
    "codec",
    "inspect",
    "load",
    "pack_tensor",
    "save",
    "unpack",
    "unpack_codes",
    "unpack_tensor",
]
