"""Attention of rows over pages in Triton's interpreter, against torch's own."""

import interpreter  # noqa: F401
import torch
import torch.nn.functional as F

from cosyq.kernels.decode import PAGE
from cosyq.kernels.rows import Pass, Shape, attend, rows_of


def test_more_pages_than_are_merged_at_a_time():
    """One row's past is merged in two turns, the other's is one page and part of the next."""
    generator = torch.Generator().manual_seed(2)
    shape, lasts, pages = Shape(32, 16, 2, 1, 16, 1e-6), (4 * PAGE + 9, PAGE + 3), 5
    table = 1 + torch.randperm(2 * pages, generator=generator).view(2, pages).int()
    cos = torch.zeros(pages * PAGE, 8)
    positions, owners = torch.tensor(lasts, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    b = rows_of(shape, positions, owners, table, cos, cos, torch.float32, together=False)
    keys, values = torch.randn(2, 1 + 2 * pages, 1, PAGE, 16, generator=generator)
    b.q.normal_(generator=generator)
    for _ in range(2):  # counts are zero again behind a pass
        b.attended.zero_()
        attend(keys, values, b, Pass(2, pages, False, shape, pdl=False))
        for row, last in enumerate(lasts):
            past = (t[table[row].long(), 0].flatten(0, 1)[: last + 1].expand(2, -1, -1) for t in (keys, values))
            expected = F.scaled_dot_product_attention(b.q[row].view(2, 1, 16), *past)
            torch.testing.assert_close(b.attended[row], expected.flatten())
