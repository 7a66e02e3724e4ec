"""How a chain is solved: numbers of iterations, and what approximates the Jacobians between them."""

from __future__ import annotations

from dataclasses import dataclass

from hbll_seq.engine.linearization.base import Composer, Identity, Linearization


@dataclass(frozen=True)
class Iterations:
    """How a chain is solved; ``Sweeps`` of the objectives checks the values and gives this.

    Attributes:
        forward: K, iterations before the differentiated one.
        backward: M, iterations of the adjoints.
        chunk_size: c, transitions that one iteration takes one after the other, the differentiated one too.
        linearization: what approximates the Jacobians.
        damping: fraction of the step from the old estimate to the new one that an iteration takes; 1 is the plain
            iteration, and the only one that ever makes a state exact.
        tolerance: stop early once the residual is at most this (waits for the device); 0 does all iterations.
        clip: diagonals of a recurrent cell are held within -clip .. clip, so that a scan of many cannot explode.
    """

    forward: int
    backward: int = 0
    chunk_size: int = 1
    linearization: Linearization = Identity()
    damping: float = 1.0
    tolerance: float = 0.0
    clip: float = 1.0

    def segments(self, n_steps: int) -> tuple[int, int]:
        """Transitions of a segment of a chain of N, and how many segments it has; the last one may be short."""
        size = min(self.chunk_size, n_steps)
        return size, -(-n_steps // size)

    def composer(self, learned: Composer | None = None) -> Composer:
        """What composes segments: the linearization, or its learned maps.

        Raises:
            ValueError: a linearization that is learned without its maps, or one that is not with maps.
        """
        if isinstance(self.linearization, Composer) == (learned is not None):
            raise ValueError(
                f"linearization={self.linearization.name!r} with learned={type(learned).__name__}: low_rank and "
                "shared_matrix need their learned maps, and they alone; pass learned=.. with them and leave it out otherwise"
            )
        return learned or self.linearization


def one_walk(n_steps: int) -> Iterations:
    """A chain of N transitions as one segment: walked from its start to its end, and back."""
    return Iterations(0, 0, chunk_size=n_steps)
