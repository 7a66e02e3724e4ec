"""What to say where the packages of an extra are not installed."""

from __future__ import annotations


def how_to_install(package: str, extra: str) -> str:
    """That a package is missing, and which extra brings it."""
    return (f'{package} is not installed: pip install "hbll_seq[{extra}]", or in a clone of the repository '
            f'pip install -e ".[{extra}]"')


def without_extra(error: ModuleNotFoundError, packages: tuple[str, ...], extra: str) -> ImportError:
    """The error to raise in place of ``error``: one that names the extra where it is one of these packages that is missing,
    else ``error`` itself."""
    package = (error.name or "").partition(".")[0]
    if package not in packages:
        return error
    return ImportError(f"hbll_seq.integrations: {how_to_install(package, extra)}", name=package)
