"""Initial values of a chain: B = 0, A Kaiming uniform, the links by scheme.

Every tensor has a random stream of its own, seeded by (seed, module path, tensor name). So A is the same at
every depth and whatever other modules are adapted, which is what makes arms of different depth comparable.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from linchain_cli.chain.layer import Chain

SCHEMES = ("orthogonal", "identity", "kaiming")


def random_stream(seed: int, path: str, tensor: str) -> torch.Generator:
    """The random numbers of one tensor of the module at `path`."""
    digest = hashlib.sha256(f"{seed}\0{path}\0{tensor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initial_links(scheme: str, depth: int, rank: int, generator: torch.Generator) -> Tensor:
    """Fresh links (depth, r, r) in float32.

    `orthogonal`: random orthogonal matrices, gain 1, so the product keeps lengths at any depth.
    `identity`: the chain starts as LoRA.
    `kaiming`: U(±1/√r) as in the LinChain authors' code; each link scales a signal by about 1/√3.
    """
    links = torch.empty(depth, rank, rank)
    for link in links:
        if scheme == "orthogonal":
            nn.init.orthogonal_(link, generator=generator)
        elif scheme == "identity":
            nn.init.eye_(link)
        elif scheme == "kaiming":
            nn.init.uniform_(link, -1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator)
        else:
            raise ValueError(f"unknown initialisation '{scheme}', expected one of {', '.join(SCHEMES)}")
    return links


def initial_gain(scheme: str, depth: int) -> float:
    """What fresh links multiply a signal by: the root of E‖Wn…W1·x‖² / ‖x‖².

    An entry of U(±1/√r) has the variance 1/(3r), and an output sums r of them: 1/√3 for each kaiming link.
    """
    return 3 ** (-depth / 2) if scheme == "kaiming" else 1.0


@torch.no_grad()
def initialise(layer: Chain, path: str, scheme: str, seed: int) -> None:
    """Sets A to U(±1/√d_in) (Kaiming uniform with a = √5), B to zero and the links by `scheme`, in place.

    Values are drawn on the CPU, so they do not depend on the device.
    """
    d_in = layer.A.shape[-1]
    A = torch.empty(layer.A.shape).uniform_(
        -1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=random_stream(seed, path, "A")
    )
    layer.A.copy_(A)
    generator = random_stream(seed, path, "links")
    for links in layer.links if layer.links.dim() == 4 else [layer.links]:  # of each expert, or of the one
        links.copy_(initial_links(scheme, layer.depth, layer.rank, generator))
    layer.B.zero_()
