"""What processes send each other through ``torch.distributed``, counted, and the same over a link that is slow.

Processes of one machine share its clock and its files: a sender notes there when its message would have arrived over the
link, and who waits for the message waits until then.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from hbll_seq.distributed import placement

#: function -> how many bytes this rank of R sends, by the bytes of the tensor that is given first by these names: of a
#: reduction round a ring, of a tensor to every other rank
_COLLECTIVES: dict[str, tuple[tuple[str, ...], Callable[[int, int], float]]] = {
    "all_reduce": (("tensor",), lambda n, size: 2 * (size - 1) / size * n),
    "all_gather_single": (("input_tensor", "input"), lambda n, size: (size - 1) * n),
    "all_gather_into_tensor": (("input_tensor", "input"), lambda n, size: (size - 1) * n),
    "reduce_scatter_single": (("input_tensor", "input"), lambda n, size: (size - 1) / size * n),
    "reduce_scatter_tensor": (("input_tensor", "input"), lambda n, size: (size - 1) / size * n),
}
_POSITION = {"all_reduce": 0}  # of that tensor among the arguments; of all others the output goes before it
_MESSAGES = ("send", "recv", "isend", "irecv")
_SLOTS = 4096  # messages of a pair of ranks that may be under way at once


@dataclass(frozen=True)
class Link:
    """A link: a collective or message takes ``delay`` seconds and its bytes over ``rate`` bytes per second; those that a rank
    sends follow one another."""

    delay: float = 0.0
    rate: float = float("inf")


@dataclass
class Sent:
    """What this rank has sent: collectives that it took part in, messages to one other rank, bytes of both."""

    collectives: int = 0
    messages: int = 0
    bytes: float = 0.0


class Wire:
    """Watches ``torch.distributed`` inside ``with wire.watched():``, and makes it as slow as a link is.

    What C++ code sends by itself is not seen: the reducer of DistributedDataParallel, unless it has a hook in Python.

    Args:
        rank, n_ranks: of this process.
        link: None only counts.
        board: a file that all ranks share, for the times of arrival; needed with a link.

    Attributes:
        sent: counted so far.
    """

    def __init__(self, rank: int, n_ranks: int, link: Link | None = None, board: Path | None = None):
        self.rank, self.n_ranks, self.link, self.sent = rank, n_ranks, link, Sent()
        self._free, self._inside = 0.0, False
        self._begun: dict[tuple[int, int], int] = {}
        if link is not None:
            self._board = np.memmap(board, np.float64, "r+", shape=(n_ranks, n_ranks, _SLOTS))

    @staticmethod
    def make_board(path: Path, n_ranks: int) -> None:
        """The file of times for ``n_ranks``."""
        np.memmap(path, np.float64, "w+", shape=(n_ranks, n_ranks, _SLOTS)).flush()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Sent]:
        """Puts this wire between the program and ``torch.distributed``; yields what is counted."""
        places = [(distributed, name) for name in (*_COLLECTIVES, *_MESSAGES) if hasattr(distributed, name)]
        places += [(distributed_c10d, name) for _, name in places] + [(placement, "_gather")]
        before = [(module, name, getattr(module, name)) for module, name in places]
        wrapped: dict[Any, Any] = {}  # a function has one wrapper: torch compares what it is given with its own
        try:
            for module, name, function in before:
                setattr(module, name, wrapped.setdefault(function, self._wrapped(function, name)))
            yield self.sent
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    def _wrapped(self, function: Callable, name: str) -> Callable:
        act = self._collective if name in _COLLECTIVES else self._message

        @functools.wraps(function)
        def call(*args, **keywords):
            if self._inside:  # one function of torch calls another
                return function(*args, **keywords)
            self._inside = True
            try:
                return act(name, functools.partial(function, *args, **keywords), args, keywords)
            finally:
                self._inside = False

        return call

    def _collective(self, name: str, call: Callable, args: tuple, keywords: dict) -> Any:
        names, bytes_of = _COLLECTIVES[name]
        position = _POSITION.get(name, 1)
        tensor = args[position] if len(args) > position else next(keywords[n] for n in names if n in keywords)
        size = distributed.get_world_size(keywords.get("group"))
        n_bytes = bytes_of(_bytes(tensor), size)
        self.sent.collectives += 1
        self.sent.bytes += n_bytes
        if self.link is None:
            return call()
        if keywords.get("async_op"):
            return _Late(call(), functools.partial(_wait_until, self._arrival(n_bytes)))
        done = call()
        _wait_until(self._arrival(n_bytes))  # all ranks are there by now: from here it takes as long as the link does
        return done

    def _message(self, name: str, call: Callable, args: tuple, keywords: dict) -> Any:
        sends, tensor = name.endswith("send"), args[0] if args else keywords["tensor"]
        peer = self._peer(args, keywords, "dst" if sends else "src")
        if sends:
            self.sent.messages += 1
            self.sent.bytes += _bytes(tensor)
            if self.link is not None:
                self._slot(self.rank, peer)[...] = self._arrival(_bytes(tensor))
            return call()
        if self.link is None:
            return call()
        slot = self._slot(peer, self.rank)
        done = call()
        wait = lambda: _wait_until(float(slot))
        if name == "irecv":
            return _Late(done, wait)
        wait()
        return done

    def _peer(self, args: tuple, keywords: dict, end: str) -> int:
        """The global rank of whom a message goes to or comes from."""
        in_group = keywords.get(f"group_{end}")
        if in_group is None:
            return args[1] if len(args) > 1 else keywords[end]
        return distributed.get_global_rank(keywords.get("group") or distributed.group.WORLD, in_group)

    def _slot(self, source: int, target: int) -> np.ndarray:
        """Where the arrival of the next message between two ranks is noted; both count their messages alike."""
        number = self._begun.get((source, target), 0)
        self._begun[source, target] = number + 1
        return self._board[source, target, number % _SLOTS :][:1].reshape(())

    def _arrival(self, n_bytes: float) -> float:
        """When what is sent now has arrived."""
        self._free = max(self._free, time.monotonic()) + n_bytes / self.link.rate
        return self._free + self.link.delay


class _Late:
    """A handle of torch whose ``wait`` also waits for the link."""

    def __init__(self, work: Any, wait: Callable[[], None]):
        self._work, self._wait = work, wait

    def wait(self, *args: Any) -> Any:
        done = self._work.wait(*args)
        self._wait()
        return done

    def get_future(self) -> Any:
        """The future of the handle, which the link holds back."""

        def late(future):
            self._wait()
            return future.value()

        return self._work.get_future().then(late)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _wait_until(moment: float) -> None:
    if (left := moment - time.monotonic()) > 0:
        time.sleep(left)
