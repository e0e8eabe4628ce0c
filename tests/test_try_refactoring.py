"""scripts/try_refactoring.py: other factors, the same function, and gradients that follow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from linchain_cli.chain.layer import delta_weight

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "try_refactoring.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("try_refactoring", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["links", "balance"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_function_stays_and_gradients_follow_the_change_of_basis(script, mode, depth):
    torch.manual_seed(0)
    links = torch.linalg.qr(torch.randn(depth, 4, 4)).Q + 0.1 * torch.randn(depth, 4, 4)
    old = [tensor.double() for tensor in (torch.randn(4, 10), links, 0.1 * torch.randn(12, 4))]
    *new, t_a, t_b = script.refactored(*old, mode)
    torch.testing.assert_close(delta_weight(*new, 2.0, torch.float64), delta_weight(*old, 2.0, torch.float64))
    eye = torch.eye(4, dtype=torch.float64).expand(depth, 4, 4)
    torch.testing.assert_close(new[1] @ new[1].mT, eye)
    if mode == "balance":
        torch.testing.assert_close(torch.linalg.svdvals(new[0]), torch.linalg.svdvals(new[2]))

    into = torch.randn(12, 10, dtype=torch.float64)  # a loss's gradient with respect to ΔW

    def gradients(factors):
        leaves = [factor.detach().clone().requires_grad_() for factor in factors]
        A, links, B = leaves
        middle = script.product(links, 4)
        (into * (B @ middle @ A)).sum().backward()
        return A.grad, B.grad

    (a_old, b_old), (a_new, b_new) = gradients(old), gradients(new)
    torch.testing.assert_close(torch.linalg.inv(t_a).T @ a_old, a_new)
    torch.testing.assert_close(b_old @ torch.linalg.inv(t_b).T, b_new)
