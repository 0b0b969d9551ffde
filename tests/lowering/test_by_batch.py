"""A program that is compiled for one batch size at a time keeps the last few sizes, whatever threads ask for."""

from concurrent.futures import ThreadPoolExecutor

import torch

from tfmq_fx.lowering.run.by_batch import MOST_SESSIONS, ByBatch
from tfmq_fx.testing import GraphBuilder


def doubling():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 3))
    graph_module = builder.build([builder.call(torch.ops.aten.mul.Tensor, x, 2.0)])
    compiled = []

    def compile_for(batch):
        compiled.append(batch)
        return lambda tensors: [tensors[0] * 2.0]

    return ByBatch(graph_module, compile_for), compiled


def test_the_least_recently_used_size_gives_way():
    run, compiled = doubling()
    sizes = range(1, MOST_SESSIONS + 2)
    for size in (*sizes, MOST_SESSIONS + 1, 1):
        run(torch.ones(size, 3))
    assert compiled == [*sizes, 1]


def test_threads_with_more_sizes_than_are_kept():
    run, _ = doubling()

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for size in torch.randint(1, 3 * MOST_SESSIONS, (300,), generator=generator).tolist():
            (result,) = run(torch.full((size, 3), float(seed)))
            assert result.shape == (size, 3) and bool((result == 2.0 * seed).all())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
