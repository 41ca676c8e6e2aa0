"""`python -m sglang_router.engine`: the built-in engine; with `--backend llamacpp`, llama.cpp's server."""

from __future__ import annotations

import argparse
import sys

from sglang_router.engine.options import parse_options
from sglang_router.process import open_standard_descriptors


def main(argv: list[str] | None = None) -> int:
    """Run an engine until it is stopped; return its exit status."""
    open_standard_descriptors()
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--backend", choices=("builtin", "llamacpp"), default="builtin")
    chosen, rest = chooser.parse_known_args(argv)
    if chosen.backend == "llamacpp":
        from sglang_router.engine.llamacpp import main as llamacpp  # imported here: the built-in engine works without

        return llamacpp(rest)
    options = parse_options(rest)
    from sglang_router.engine.server import serve  # imported here, so that --help is fast

    return serve(options)


if __name__ == "__main__":
    sys.exit(main())
