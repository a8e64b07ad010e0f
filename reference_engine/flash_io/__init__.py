"""Moving byte ranges from flash to memory. Knows files, offsets and buffers; knows nothing of neurons."""

from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT, aligned_empty
from reference_engine.flash_io.cyclic_stream import CyclicStream, StreamRange
from reference_engine.flash_io.direct_file import DirectFile, IoCounters

__all__ = ["IO_ALIGNMENT", "CyclicStream", "DirectFile", "IoCounters", "StreamRange", "aligned_empty"]
