"""flashfmt: an open on-disk format for language models bigger than memory."""

from flashfmt.bundles import Bundles
from flashfmt.container import Extent
from flashfmt.encodings import Encoding
from flashfmt.errors import (
    ChecksumError,
    FlashError,
    FlashFormatError,
    FlashReadError,
    FlashWriteError,
    UnsupportedError,
)
from flashfmt.manifest import FORMAT_VERSION, Decoder, Manifest
from flashfmt.reader import FlashModel
from flashfmt.reader import open_model as open
from flashfmt.rules import RULES
from flashfmt.specs import BundlesSpec, FileSpec, TensorSpec
from flashfmt.tensor import BundlesInfo, FileInfo, StoredTensor, TensorInfo
from flashfmt.writer import FlashWriter

__version__ = "1.0.0"

__all__ = [
    "FORMAT_VERSION",
    "RULES",
    "Bundles",
    "BundlesInfo",
    "BundlesSpec",
    "ChecksumError",
    "Decoder",
    "Encoding",
    "Extent",
    "FileInfo",
    "FileSpec",
    "FlashError",
    "FlashFormatError",
    "FlashModel",
    "FlashReadError",
    "FlashWriteError",
    "FlashWriter",
    "Manifest",
    "StoredTensor",
    "TensorInfo",
    "TensorSpec",
    "UnsupportedError",
    "open",
]
