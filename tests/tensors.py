"""Seeded tensors and weights, and how far two results are apart."""

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    """fp32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with weights that keep activations near 1, gains and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.data = fill(name, p.shape, generator)
    return module.eval().requires_grad_(False)


def fill(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers for the parameter of that name, such as random() takes."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise * noise[0].numel() ** -0.5
    return 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def rel(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value wanted."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def rel_l1(new: Tensor, old: Tensor) -> float:
    """The sum of the differences, as a share of the sum of old."""
    return ((new - old).abs().sum() / old.abs().sum()).item()
