"""How a field of the settings is declared: with its group, and whether a resumed run may change it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hbll_seq.engine.linearization.base import Linearization
from hbll_seq.objectives.axes import AXES
from hbll_seq.utils.options import option

#: what an axis is in words
_WHERE = {"depth": "sweeps", "layer": "recurrent blocks, over time"}


def setting(group: str, default: Any, help: str, *, resume: str = "fixed", of: tuple | None = None, **allowed: Any) -> Any:
    """A field.

    Args:
        group: under which the help lists it.
        default, help, allowed: see :func:`hbll_seq.utils.options.option`.
        resume: whether a resumed run may change it: "fixed" no, "free" yes, because no weight depends on it, "resolved":
            what came of it is compared (``resuming.check_identity``).
        of: the option that it is, see :func:`option_of`.
    """
    return option(default, help, group=group, resume=resume, of=of, **allowed)


def option_of(kind: type, name: str, axis: str | None = None, **other: Any) -> Any:
    """A field that is the option ``name`` of an options class; for sweeps with the default of an axis.

    Args:
        kind: the class that says what the option means and may be.
        name: of the option there.
        axis: of ``AXES``, for :class:`Sweeps`.
        other: what is otherwise here.
    """
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    own = {"group": "objective", "default": field.default, **field.metadata, "of": (kind, axis, name)}
    if axis is not None:
        default = getattr(AXES[axis], name, field.default)
        own["default"] = default.name if isinstance(default, Linearization) else default
        if name == "linearization":
            own["choices"] = tuple(kind.name for kind in AXES[axis].linearizations)
        if name == "init":
            own["choices"] = AXES[axis].inits
        own["help"] = f"{_WHERE[axis]}: {field.metadata['help']}"
    return setting(**{**own, **other})
