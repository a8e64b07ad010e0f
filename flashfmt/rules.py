"""The rules of SPEC.md that a reader checks: id and one-line statement. Pure data.

One rule, three places, one id: the sentence in SPEC.md, the check that raises it here in the package, and at least
one invalid conformance case. An id is never reused or renumbered. Rules marked *verify* need the payload bytes and
are checked by `FlashModel.verify`; all others are checked when a file is opened (FF-IDX when a layer's bundles are).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

RULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        # The single file: a ZIP64 archive.
        "FF-ZIP-1": "A `.flash` file is a ZIP archive whose first local file header stands at byte 0.",
        "FF-ZIP-2": "The file ends with the ZIP64 end record, the ZIP64 locator and the end record, adjacent in this "
        "order, without a comment, and nothing follows.",
        "FF-ZIP-3": "The end records are made by 0x032D, need version 45, describe one disk and agree with each other: "
        "a count, size or offset in the end record is the ZIP64 value or all ones.",
        "FF-ZIP-4": "The central directory ends where the ZIP64 end record begins and holds exactly the stated number "
        "of entries.",
        "FF-ZIP-5": "Every entry is STORED, unencrypted, of equal compressed and uncompressed size, with flags 0x0800, "
        "version needed 45, made by 0x032D, DOS time 1980-01-01 00:00, disk 0, no comment, internal attributes 0 and "
        "external attributes 0o100644 << 16.",
        "FF-ZIP-6": "The extra data of a central entry is exactly one ZIP64 field of both sizes and the offset, and "
        "the three 32-bit fields are all ones.",
        "FF-ZIP-7": "An entry name is a key: 1 to 1024 ASCII bytes, segments of [a-z0-9_.-] separated by '/', no "
        "segment empty or beginning with '.' or '-'.",
        "FF-ZIP-8": "Entry names are unique.",
        "FF-ZIP-9": "A local file header agrees with its central entry in every field they share.",
        "FF-ZIP-10": "The extra data of a local header is exactly a ZIP64 field of both sizes, then an alignment field "
        "(0xD935) of a 16-bit alignment and zero padding.",
        "FF-ZIP-11": "Entries follow each other without gap or overlap in the order of the central directory, which "
        "begins where the last payload ends.",
        "FF-ZIP-12": "The zarr.json entries come first, by depth and then by key, the root first.",
        "FF-ZIP-13": "The CRC-32 of an entry matches its bytes (verify).",
        # The directory container.
        "FF-DIR-1": "A model directory holds the document zarr.json.",
        "FF-DIR-2": "A model directory holds regular files and directories only, no symbolic links.",
        "FF-DIR-3": "Every path in a model directory is a key by the grammar of FF-ZIP-7, and no directory is empty.",
        # JSON documents.
        "FF-JSON-1": "A document is UTF-8 without a byte order mark.",
        "FF-JSON-2": "A document is valid JSON (RFC 8259).",
        "FF-JSON-3": "No JSON object repeats a key.",
        "FF-JSON-4": "Numbers are finite in binary64, integers fit 64 bits; NaN and Infinity are refused.",
        "FF-JSON-5": "The top level of a document is an object.",
        "FF-JSON-6": "Strings hold no unpaired surrogates.",
        # Version and features.
        "FF-VER-1": "A reader refuses a manifest whose major version it does not know, before it looks at the rest.",
        "FF-VER-2": "A reader refuses a manifest with a required feature that it does not know.",
        "FF-VER-3": "The manifest's version is a string 'major.minor' of decimal numbers without leading zeros.",
        # The manifest, and the arrays it calls for.
        "FF-MAN-1": "The attributes of the root group hold the manifest, an object, under the key flashfmt.",
        "FF-MAN-2": "The manifest follows its schema: fields, types, ranges.",
        "FF-MAN-3": "Names of rotary tables are unique, and a layer's rotary is the name of a table or null.",
        "FF-MAN-4": "The number of attention heads is a multiple of the number of key/value heads.",
        "FF-MAN-5": "A rotary table turns at most head_dim dimensions.",
        "FF-MAN-6": "The embedding has projections exactly where d_embed differs from d_model.",
        "FF-MAN-7": "Special token ids are below vocab_size.",
        "FF-MAN-8": "Learned positions have a row for every position: context_tokens + offset <= n_rows.",
        "FF-MAN-9": "shared_norm occurs only with the parallel block order, gate_bias only with a gated FFN.",
        "FF-MAN-10": "Every array is one that the manifest calls for, or lies under extensions/.",
        "FF-MAN-11": "Every array that the manifest calls for is present.",
        "FF-MAN-12": "An array has the logical shape that the manifest implies.",
        "FF-MAN-13": "An array has an encoding that its role allows: any weight encoding for matrices, f32 for "
        "vectors, u32 for checksums.",
        # The Zarr profile.
        "FF-ARR-1": "Every document is of zarr_format 3 and node_type group or array; the root is a group.",
        "FF-ARR-2": "A group document has the fields zarr_format, node_type and attributes only; every ancestor of a "
        "node is a group with a document of its own.",
        "FF-ARR-3": "An array document has the fields of Zarr v3 arrays only, and no storage transformers.",
        "FF-ARR-4": "An array has 1 to 8 dimensions, none of them zero.",
        "FF-ARR-5": "The chunk grid is regular with one chunk: chunk_shape equals shape.",
        "FF-ARR-6": "The chunk key encoding is default with the separator '/'.",
        "FF-ARR-7": "The fill value is 0.",
        "FF-ARR-8": "The codecs are those of the array's kind: [bytes], [bytes, zstd] or [bytes, blosc] for tensors, "
        "[bytes] for files, [sharding_indexed] for bundles; bytes is little-endian.",
        "FF-ARR-9": "The data type is the storage type of the array's encoding.",
        "FF-ARR-10": "The attributes of an array hold, under the key flashfmt, an object of kind tensor, file or "
        "bundles with the fields of that kind; arrays under extensions/ are tensors.",
        "FF-ARR-11": "Every key is a document or the chunk of an array.",
        "FF-ARR-12": "Every array has its chunk.",
        # Tensors.
        "FF-TEN-1": "The storage shape is the logical shape for plain encodings, and [rows, part_nbytes] for q8 and "
        "q4, which have two dimensions and rows of a multiple of 64 weights.",
        "FF-TEN-2": "The payload of an uncompressed array has exactly the bytes of its storage shape.",
        "FF-TEN-3": "A compressed payload states in its header, and decompresses to, exactly the bytes of the storage "
        "shape (verify, or when the tensor is read).",
        "FF-TEN-4": "Weights and scales, of tensors and of bundles, are finite (verify).",
        "FF-TEN-5": "Padding inside q8 and q4 rows, of tensors and of bundles, is zero (verify).",
        # Bundles.
        "FF-BND-1": "Parts, n_neurons and d_model of bundles are those of the manifest's decoder.",
        "FF-BND-2": "Bundles have a weight encoding; for q8 and q4 d_model is a multiple of 64.",
        "FF-BND-3": "part_nbytes is the size of an encoded row of d_model weights, row_nbytes that of all parts.",
        "FF-BND-4": "The storage shape is [n_neurons, parts, d_model], for q8 and q4 [n_neurons, parts, part_nbytes].",
        "FF-BND-5": "The sharding codec has inner chunks of one bundle, inner codecs [bytes], index codecs [bytes, "
        "crc32c] and its index at the end.",
        "FF-BND-6": "The stride is not smaller than row_nbytes.",
        "FF-BND-7": "The payload has exactly n_neurons * stride + 16 * n_neurons + 4 bytes.",
        "FF-BND-8": "The bytes between the end of a bundle and the end of its stride are zero (verify).",
        # The shard index.
        "FF-IDX-1": "The shard index has 16 bytes a bundle and 4 bytes of checksum.",
        "FF-IDX-2": "The last four bytes of the shard index are the little-endian CRC-32C of its entries.",
        "FF-IDX-3": "Entry i of the shard index is (i * stride, row_nbytes).",
        # Checksums.
        "FF-SUM-1": "metadata_crc32c matches the documents.",
        "FF-SUM-2": "The text of the field metadata_crc32c occurs exactly once in the root document.",
        "FF-SUM-3": "The crc32c of a tensor matches its stored bytes (verify).",
        "FF-SUM-4": "The crc32c of a bundles array matches its payload (verify).",
        "FF-SUM-5": "bundle_crc32c matches each bundle (verify).",
        "FF-SUM-6": "The crc32c and sha256 of an embedded file match its bytes (verify, or when the file is read).",
        # Embedded files.
        "FF-FILE-1": "An embedded file is an array files/{role}, one dimension of uint8; a role matches "
        "[a-z][a-z0-9_]* and has at most 64 characters.",
        "FF-FILE-2": "A filename is a plain name of 1 to 255 printable ASCII characters without '/' and '\\', and "
        "neither '.' nor '..'.",
        # Predictors and statistics.
        "FF-PRED-1": "A predictor belongs to a layer of the decoder, and a layer has at most one.",
        "FF-PRED-2": "The input tap of a predictor lies in its own layer or an earlier one.",
        "FF-PRED-3": "A low_rank predictor has a rank; a low_bit_gate has neither rank nor bias.",
        "FF-PRED-4": "The threshold of a low_rank predictor lies in [0, 1].",
        "FF-STAT-1": "Firing frequencies lie in [0, 1] (verify).",
        "FF-STAT-2": "The aggregated window is not negative and never decreases (verify).",
        # Limits.
        "FF-LIM-1": "A file has at most 2^20 entries.",
        "FF-LIM-2": "A central directory has at most 256 MiB.",
        "FF-LIM-3": "A document has at most 1 MiB.",
        "FF-LIM-4": "JSON nests at most 32 deep.",
        "FF-LIM-5": "A layer has at most 2^24 neurons.",
        "FF-LIM-6": "Bundles, their stride, and encoded rows of q8 and q4 tensors have at most 16 MiB.",
        "FF-LIM-7": "A dimension is at most 2^31.",
        "FF-LIM-8": "An embedded file has at most 256 MiB.",
        # Alignment.
        "FF-ALIGN-1": "In a `.flash` file the payload of bundles begins at a multiple of 16384 and of its alignment.",
        "FF-ALIGN-2": "In a `.flash` file every document and every other payload begins at a multiple of 64.",
        "FF-ALIGN-3": "The alignment field of a local header states a power of two that divides the payload's offset, "
        "and its padding is the least that reaches it.",
        "FF-ALIGN-4": "The alignment of bundles is a power of two from 64 to 32768.",
        "FF-ALIGN-5": "The stride of bundles is a multiple of their alignment.",
    }
)
