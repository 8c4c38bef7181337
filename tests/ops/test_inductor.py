import torch

import logra_kernels as lk


def every_op(x, dy, p_in, p_out, rows, total):
    a = lk.project_rows(x * 2, p_in)
    g = lk.project_grad(a, dy + 1, None, p_out).flatten(1)
    lk.accumulate_gram(g, total)
    scores = lk.score_block(g, rows).tanh()
    values, index = lk.score_topk(g, rows, 3)
    return scores.gather(1, index) + values


def test_all_ops_between_generated_kernels(device):
    def draw(*shape):
        return torch.randn(*shape, device=device)

    compiled = torch.compile(every_op, fullgraph=True, dynamic=True)
    for n, t in ((2, 9), (3, 17)):
        args = draw(n, t, 24), draw(n, t, 16), draw(5, 24), draw(4, 16), draw(30, 20)
        total, compiled_total = torch.zeros(20, 20, device=device), torch.zeros(20, 20, device=device)
        want = every_op(*args, total)
        torch.testing.assert_close(compiled(*args, compiled_total), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled_total, total, rtol=1e-4, atol=1e-3)
