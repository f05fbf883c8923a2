"""Sums over ranks; what one process alone gets. Two processes: tests/model/test_router_ranks.py."""

from __future__ import annotations

import torch

from mor.ops import ranks


def test_alone_each_answer_is_the_processs_own(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.world_size() == 1
    assert not ranks.is_distributed()
    one, two = ranks.sum_over_ranks(3, torch.tensor(4.0), like=torch.zeros(1))
    assert (one.item(), two.item(), one.dtype) == (3, 4, torch.int64)
    assert ranks.all_reduce_mean(torch.tensor(6.0), torch.tensor(4.0)) == 1.5
    assert ranks.all_reduce_mean(torch.tensor(0.0), torch.tensor(0.0)).isnan()
    assert ranks.any_rank(True, torch.device("cpu")) is True
    assert ranks.any_rank(False, torch.device("cpu")) is False


def test_the_launcher_says_how_many(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.world_size() == 4


def test_two_ranks(monkeypatch) -> None:
    def add_the_other(tensor: torch.Tensor, op: object = None) -> None:
        tensor.copy_(torch.maximum(tensor, torch.ones_like(tensor)) if op else tensor * 2)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other)
    assert [n.item() for n in ranks.sum_over_ranks(3, 4, like=torch.zeros(1))] == [6, 8]
    assert ranks.all_reduce_mean(torch.tensor(6.0), torch.tensor(4.0)) == 1.5
    assert ranks.any_rank(False, torch.device("cpu")) is True
