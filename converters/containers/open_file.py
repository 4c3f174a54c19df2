"""A file that any thread may read at any offset."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import SourceError, os_hint


class OpenFile:
    """A file open for reads at any offset from any thread; closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"{path}: {error.strerror}", hint=os_hint(error, "Check the path.")
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes from ``offset``; ``SourceError`` where the file has become shorter."""
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:
            try:
                count = os.preadv(self._descriptor, [data.data[done:]], offset + done)
            except OSError as error:
                raise SourceError(
                    f"{self.path}: {error.strerror}", hint=os_hint(error, "Check the disk.")
                ) from error
            if count == 0:
                raise SourceError(
                    f"{self.path}: {size - done} bytes are missing at offset {offset + done}",
                    hint="The file became shorter while it was read.",
                )
            done += count
        return data
