"""A stream of tokens cut into windows, served in a seeded order.

Shapes: B batch (of one process), T context_length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from hbll_seq.data.tokens import TokenStream
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole

MAX_BATCH = 1 << 27  # tokens of one batch: a GiB of ids
_CONTIGUOUS = 1 << 32  # no epoch has this number, so it seeds a separate stream


class TokenWindows:
    """A stream cut into windows of context_length + 1 tokens; a window's last token is the next one's first.

    Every method raises ValueError for arguments that are no whole numbers in their range, this constructor also when the
    stream holds no tokens or is shorter than one window.
    """

    def __init__(self, stream: TokenStream, context_length: int) -> None:
        context_length = as_whole("context_length", context_length, 1)
        tokens = getattr(stream, "tokens", None)
        if getattr(tokens, "ndim", None) != 1 or getattr(getattr(tokens, "dtype", None), "kind", None) not in ("i", "u"):
            raise ValueError(f"stream is {quote(stream)}; it must be a TokenStream of a 1-D array of whole numbers")
        if stream.n_tokens < context_length + 1:
            raise ValueError(
                f"the text has {stream.n_tokens} tokens, but one window needs context_length + 1 = "
                f"{quote(context_length + 1)}; give more text or a smaller context_length"
            )
        self.stream, self.context_length = stream, context_length
        # An epoch starts at a random offset below context_length; n_windows is what fits behind every offset.
        self.n_windows = max(1, (stream.n_tokens - context_length) // context_length)
        self._n_offsets = min(context_length, stream.n_tokens - self.n_windows * context_length)
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def epoch_order(self, seed: int, epoch: int) -> tuple[int, np.ndarray]:
        """(where the first window starts, order of the n_windows windows): a pure function of seed and epoch."""
        seed, epoch = as_whole("seed", seed, 0), as_whole("epoch", epoch, 0)
        if (seed, epoch) not in self._orders:
            rng = np.random.default_rng([seed, epoch])
            offset, order = int(rng.integers(self._n_offsets)), rng.permutation(self.n_windows)
            order.flags.writeable = False
            while len(self._orders) > 1:  # a batch spans two epochs at most, as a rule
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = offset, order
        return self._orders[seed, epoch]

    def batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """Training windows, LongTensor [B, T + 1]: a pure function of the arguments.

        The ranks' batches of a step joined are the batch that one process with batch_size * world_size would get;
        consecutive steps walk through one epoch's order after the other, a batch may span two.
        """
        step, batch_size = as_whole("step", step, 0), self._rows(batch_size)
        world_size = as_whole("world_size", world_size, 1)
        rank = as_whole("rank", rank, 0, world_size - 1)
        first = (step * world_size + rank) * batch_size
        return torch.stack([self._window(*divmod(i, self.n_windows), seed) for i in range(first, first + batch_size)])

    def contiguous_batch(self, step: int, rows: range, n_rows: int, seed: int) -> torch.Tensor:
        """Training windows for states that are carried, LongTensor [len(rows), T + 1]: a pure function of the arguments.

        Each of ``n_rows`` rows reads the text window by window from its own start: at step s + 1 a row reads the window
        after that of step s, and after the text's last window its first one. The starts are spread evenly, behind a seeded
        one. After ``n_windows / n_rows`` steps every window was read once.

        Raises ValueError: there are more rows than windows, or a row is not one of them.
        """
        step, n_rows, seed = as_whole("step", step, 0), as_whole("n_rows", n_rows, 1), as_whole("seed", seed, 0)
        if not isinstance(rows, range) or not 0 <= rows.start <= rows.stop <= n_rows or n_rows > self.n_windows:
            raise ValueError(
                f"rows {quote(rows)} must be a range below n_rows {quote(n_rows)}, and that at most the {self.n_windows} "
                "windows of the text; give a smaller batch or more text"
            )
        self._rows(max(1, len(rows)))
        rng = np.random.default_rng([seed, _CONTIGUOUS])
        offset, first = int(rng.integers(self._n_offsets)), int(rng.integers(self.n_windows))
        windows = ((first + r * self.n_windows // n_rows + step) % self.n_windows for r in rows)
        return self._stack(windows, offset)

    def _rows(self, batch_size: int) -> int:
        """A number of windows that fit into memory at once."""
        return as_whole("batch_size", batch_size, 1, max(1, MAX_BATCH // (self.context_length + 1)))

    def _window(self, epoch: int, position: int, seed: int) -> torch.Tensor:
        offset, order = self.epoch_order(seed, epoch)
        return self._slice(offset + int(order[position]) * self.context_length)

    def _slice(self, start: int) -> torch.Tensor:
        tokens = self.stream.tokens[start : start + self.context_length + 1]
        return torch.from_numpy(tokens.astype(np.int64))

    def _stack(self, windows: Iterable[int], offset: int = 0) -> torch.Tensor:
        """Windows by number, counted from ``offset``; the text's last one, alone, may be shorter."""
        return torch.stack([self._slice(offset + window * self.context_length) for window in windows])

    def evaluation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The whole stream in order, LongTensors [b, t + 1] with b <= batch_size and t <= T.

        Every token after the first is predicted exactly once. The rest behind the last full window comes last, as one
        shorter row.
        """
        batch_size = as_whole("batch_size", batch_size, 1)
        n_full = (self.stream.n_tokens - 1) // self.context_length
        for first in range(0, n_full, batch_size):
            yield self._stack(range(first, min(first + batch_size, n_full)))
        if n_full * self.context_length < self.stream.n_tokens - 1:
            yield self._stack([n_full])

    def contiguous_evaluation_batches(self, n_rows: int, max_windows: int | None = None) -> Iterator[torch.Tensor]:
        """As :meth:`evaluation_batches` for states that are carried: row b of a batch goes on where row b before it ended.

        The windows (all, or the first ``max_windows``) lie in ``n_rows`` stretches side by side. The rest behind them
        continues the last row, in batches of one row. Every token but the first is predicted exactly once.
        """
        n_rows = as_whole("n_rows", n_rows, 1)
        max_windows = None if max_windows is None else as_whole("max_windows", max_windows, 0)
        n_full = (self.stream.n_tokens - 1) // self.context_length
        limited = max_windows is not None and max_windows <= n_full
        n_windows = max_windows if limited else n_full
        length = n_windows // n_rows
        for step in range(length):
            yield self._stack(row * length + step for row in range(n_rows))
        for window in range(n_rows * length, n_windows):
            yield self._stack([window])
        if not limited and n_full * self.context_length < self.stream.n_tokens - 1:
            yield self._stack([n_full])
