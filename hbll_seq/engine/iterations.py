"""How a chain is solved: numbers of iterations, and what approximates the Jacobians between them."""

from __future__ import annotations

from dataclasses import dataclass

from hbll_seq.engine.linearization.base import Identity, Linearization


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

    def check(self, plain: tuple[type[Linearization], ...], taught: type[Linearization], learned: object) -> None:
        """Refuses a linearization that a chain cannot have, and learned maps without theirs.

        Args:
            plain: linearizations that need no maps.
            taught: the one that does.
            learned: its maps, or None.

        Raises:
            ValueError: the linearization is none of these, or the maps and it do not belong together.
        """
        if not isinstance(self.linearization, (*plain, taught)):
            allowed = ", ".join(kind.name for kind in (*plain, taught))
            raise ValueError(f"linearization={self.linearization!r}: this chain has {allowed}; choose one of them")
        if isinstance(self.linearization, taught) != (learned is not None):
            raise ValueError(
                f"linearization={self.linearization.name!r} with learned={type(learned).__name__}: {taught.name!r} needs its "
                "learned maps, and it alone; pass learned=.. with it and leave it out otherwise"
            )
