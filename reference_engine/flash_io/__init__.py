"""Moving byte ranges from flash to memory. Knows files, offsets and buffers; knows nothing of neurons."""

from reference_engine.flash_io.aligned_memory import IO_ALIGNMENT, aligned_empty
from reference_engine.flash_io.cyclic_stream import CyclicStream, StreamRange
from reference_engine.flash_io.device_profile import DeviceProfile, load_profile
from reference_engine.flash_io.direct_file import DirectFile
from reference_engine.flash_io.io_counters import IoCounters
from reference_engine.flash_io.open_reader import BackendName, open_reader
from reference_engine.flash_io.range_reader import IoTuning, Pending, RangeReader

__all__ = [
    "IO_ALIGNMENT",
    "BackendName",
    "CyclicStream",
    "DeviceProfile",
    "DirectFile",
    "IoCounters",
    "IoTuning",
    "Pending",
    "RangeReader",
    "StreamRange",
    "aligned_empty",
    "load_profile",
    "open_reader",
]
