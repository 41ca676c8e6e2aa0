"""A mark for classes that may be extended by classes that are not compiled, such as a policy of your own.

    @mypyc_attr(allow_interpreted_subclasses=True)
    class Policy: ...

mypyc reads the mark while it compiles; it does nothing when the program runs. mypyc knows it as
`mypy_extensions.mypyc_attr` only, so the stub beside this file says that it is that one. The package `mypy_extensions`
is not needed: not to run the router, compiled or not, and not to check its types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Marked = TypeVar("Marked", bound=type)


def mypyc_attr(*, allow_interpreted_subclasses: bool) -> Callable[[Marked], Marked]:
    """Return a decorator that returns the class as it is."""
    return lambda marked: marked
