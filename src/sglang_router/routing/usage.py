"""Usage: the tokens that one answer took, as its engine told them, and what the router had expected."""

from __future__ import annotations


class Usage:
    """In tokens; -1 where it is not known.

    prompt      of the prompt
    cached      those of them that the engine had in its cache
    completion  of the answer
    predicted   those of the prompt that the router believed to be in the cache; only where the engine tells `cached`
    missed      far fewer were cached than predicted, see `routing.tokens`
    """

    __slots__ = ("cached", "completion", "missed", "predicted", "prompt")

    def __init__(self, prompt: int = -1, cached: int = -1, completion: int = -1) -> None:
        self.prompt = prompt
        self.cached = cached
        self.completion = completion
        self.predicted = -1
        self.missed = False

    def __repr__(self) -> str:
        told = (self.prompt, self.cached, self.completion)
        prompt, cached, completion = ("?" if tokens < 0 else str(tokens) for tokens in told)
        return f"<Usage {cached} of {prompt} cached, {completion} written{', missed' * self.missed}>"
