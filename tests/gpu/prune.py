"""A copy of a CUDA library without the device code that is not wanted; it packs small and loads as before.

Fat binaries stay where they are and keep their headers, so nothing in the library moves; the bodies of unwanted ones
become zeros. CUDA reads a body when one of its kernels is first wanted: a kernel without one fails at its first launch.
"""

import mmap
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
"""First bytes of a fat binary. Its header (CUDA's `fatbinary.h`) goes on with version, own bytes, bytes of the rest."""
SOURCE = re.compile(rb"_INTERNAL_[0-9a-f]+_\d+_([A-Za-z0-9_]+?)_cu_")
"""Name of a source file in the symbols of its device code."""


def entries(data: mmap.mmap) -> Iterator[tuple[slice, int]]:
    """Yield the place of each body in a library's fat binaries, and its architecture, such as 90."""
    at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if version != 1 or header != 16 or at + header + size > len(data):
            at += len(MAGIC)
            continue
        place, at = at + header, at + header + size
        while place < at:
            head, body = struct.unpack_from("<IQ", data, place + 4)
            (architecture,) = struct.unpack_from("<I", data, place + 28)
            yield slice(place + head, place + head + body), architecture
            place += head + body


def prune(library: Path, out: Path, architecture: int, sources: str = "") -> int:
    """Copy a library with the device code of one architecture. Returns the bytes of that code.

    sources: regular expression of the source files to keep, without their ending; all of them if empty. Code that was
    compressed names no source, and is kept only with all.
    """
    shutil.copyfile(library, out)
    kept = 0
    with out.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for place, built_for in list(entries(data)):
            body = data[place]
            name = SOURCE.search(body)
            if built_for == architecture and (not sources or (name and re.fullmatch(sources, name[1].decode()))):
                kept += len(body)
            else:
                data[place] = bytes(len(body))
    return kept
