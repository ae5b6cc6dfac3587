"""How large a scan may say it is before anything of that size is read (a header is a claim, not a fact); what a full
disk is called; and which errors are the storage's and not a file's."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator, Sequence

from distseg.errors import DataError

MAX_VOXELS = 2**33  # 64 GiB of float64: beyond it a header is damaged, not a scan large
MAX_DEFLATE_RATIO = 1100  # deflate cannot do better than 1032 : 1
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)
_SAID = re.compile(r"\[OS error (\d+)")
COPIES = 3  # of a scan's stored values that reading and writing it takes in memory at once


def check_size(name: str, shape: Sequence[int], itemsize: int, *, at_most_nbytes: int) -> None:
    """Raises DataError where `shape` voxels of `itemsize` bytes are more than `at_most_nbytes`, which is what the file
    can hold, more than any scan, or more than this machine can."""
    voxels = math.prod(int(n) for n in shape)
    size = tuple(int(n) for n in shape)
    if min(size) < 1 or voxels > MAX_VOXELS:
        rule = f"1 to {MAX_VOXELS} voxels"
        raise DataError("damaged header", where=name, value=size, rule=rule, fix="copy it again")
    claimed = voxels * itemsize
    if claimed > at_most_nbytes:
        rule = f"it can hold {at_most_nbytes}"
        what = "header claims more than the file holds"
        raise DataError(what, where=name, value=f"{claimed} bytes", rule=rule, fix="copy it again")
    if COPIES * claimed > memory_nbytes():
        rule = f"{COPIES} times its size within this machine's {memory_nbytes() / 2**30:.1f} GiB"
        fix = "crop it, or ingest on a larger machine"
        raise DataError("too large to read here", where=name, value=f"{claimed} bytes", rule=rule, fix=fix)


@contextlib.contextmanager
def needing_room(what: str, where: object) -> Iterator[None]:
    """Around writing: a full disk, or a spent quota, is DataError "no room left `what`"."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "make room, then give the same command again"
        raise DataError(f"no room left {what}", where=where, value=error.strerror, fix=fix) from error


def of_storage(error: BaseException, name: object) -> OSError | None:
    """The OSError to raise, naming the file by `name` alone, where the system could not read: no damage, and another
    attempt may succeed. None for damage, and for files that are not there.

    Libraries raise OSErrors of their own, without an errno, for what they find in a file. TensorStore says the system's
    in words: "[OS error 5: EIO Input/output error]".
    """
    code = error.errno if isinstance(error, OSError) else None
    said = _SAID.search(str(error)) if code is None else None
    if said is not None:
        code = int(said[1])
    if code is None or code in _ABSENT:
        return None
    return OSError(code, os.strerror(code), str(name))


def memory_nbytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
