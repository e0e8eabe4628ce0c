"""Attention over sequences one behind the other: the formula, and how torch's kernel is asked for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen as torchs
from torch.nn import functional as F

from linchain_cli.model import varlen
from linchain_cli.model.varlen import Cut

HEADS = (4, 2, 8)
HERE = torch.zeros((), dtype=torch.float64)


def states(count: int, heads: int) -> torch.Tensor:
    return torch.randn(count, heads, HEADS[2], dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_reference_is_scaled_dot_product_attention(window):
    """Of each sequence; where its queries are its last tokens, of those."""
    query, key, value = states(9, 4), states(12, 2), states(12, 2)
    cut = Cut(*(torch.tensor(ends, dtype=torch.int32) for ends in ((0, 5, 9), (0, 5, 12))), 5, 7)
    found = varlen.reference(query, key, value, cut, 0.3, window)
    for own, whole in ((slice(0, 5), slice(0, 5)), (slice(5, 9), slice(5, 12))):
        length = whole.stop - whole.start
        near = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            near = near.triu(1 - window)
        count = own.stop - own.start
        expected = F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in (query[own], key[whole], value[whole])),
            attn_mask=near[-count:],
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(found[own], expected[0].transpose(0, 1))


def torchs_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's documentation says of its kernel, for each query by itself."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    left, right = window_size
    outputs = []
    ends = zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True)
    for begin_q, end_q, begin_k, end_k in ends:
        for place in range(begin_q, end_q):
            same = place + end_k - end_q  # the query's place among the keys: the last ones are level
            first = begin_k if left == -1 else max(begin_k, same - left)
            seen = slice(first, same + right + 1)
            k, v = (each[seen].repeat_interleave(len(query[0]) // len(key[0]), 1) for each in (key, value))
            weights = (scale * torch.einsum("hd,khd->hk", query[place], k)).softmax(-1)
            outputs.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(outputs)


def without_sharing(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """The signature of torch 2.11."""
    sizes = (cu_seq_q, cu_seq_k, max_q, max_k)
    return torchs_kernel(query, key, value, *sizes, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("kernel", [torchs_kernel, without_sharing])
def test_torchs_kernel_is_asked_for_the_same(monkeypatch, kernel):
    monkeypatch.setattr(torchs, "varlen_attn", kernel)
    assert varlen.agrees(varlen.flash, HEADS, HERE)


def test_what_is_asked_of_torch_has_its_shapes():
    """Its own description of the kernel, for tensors without values."""
    query, key = (torch.zeros(12, heads, 8, device="meta", dtype=torch.bfloat16) for heads in HEADS[:2])
    query.requires_grad_()
    cut = Cut(*[torch.tensor([0, 5, 12], dtype=torch.int32, device="meta")] * 2, 7, 7)
    output = varlen.flash(query, key, key, cut, 0.3, 4)
    output.sum().backward()
    assert output.shape == query.grad.shape == (12, 4, 8)


def test_a_kernel_that_differs_is_noticed():
    assert varlen.agrees(varlen.reference, HEADS, HERE)
    assert varlen.agrees(varlen.reference, HEADS, HERE.bfloat16())
    assert not varlen.agrees(varlen.flash, HEADS, HERE)  # torch has none for CPUs

    def reference(query, key, value, cut, scaling, window):
        return varlen.reference(query, key, value, cut, scaling, window)

    def wider(*inputs):
        return reference(*inputs[:-1], inputs[-1] and inputs[-1] + 1)

    def level_at_the_beginning(query, key, value, cut, scaling, window):
        first = [slice(k, k + q) for k, q in zip(cut.keys[:-1], cut.queries.diff(), strict=True)]
        key, value = (torch.cat([each[part] for part in first]) for each in (key, value))
        return reference(query, key, value, Cut(cut.queries, cut.queries, 7, 7), scaling, window)

    def without_gradient_of_keys(query, key, value, *options):
        return reference(query, key.detach() + 0 * key, value, *options)

    for wrong in (wider, level_at_the_beginning, without_gradient_of_keys):
        assert not varlen.agrees(wrong, HEADS, HERE)
