"""What a decoder that streams is called with, and what it remembers between calls."""

import weakref

from torch import Tensor, nn


class CallsOf:
    """Watches a decoder (x, state): the (T, H, W) of every x, and how many pasts were alive at once."""

    def __init__(self, decoder: nn.Module):
        self.shapes: list[tuple[int, ...]] = []
        self.most_pasts = 0
        self.pasts: dict[int, list[weakref.ref[Tensor]]] = {}  # by the count of videos so far
        decoder.register_forward_pre_hook(self.before)
        decoder.register_forward_hook(self.after)

    def before(self, decoder: nn.Module, args: tuple) -> None:
        x, state = args
        self.shapes.append(tuple(x.shape[2:]))
        if not state:  # a video starts
            self.pasts[len(self.pasts)] = []

    def after(self, decoder: nn.Module, args: tuple, out: Tensor) -> None:
        self.pasts[len(self.pasts) - 1] = [weakref.ref(past) for past in args[1].values()]
        alive = sum(any(ref() is not None for ref in refs) for refs in self.pasts.values())
        self.most_pasts = max(self.most_pasts, alive)
