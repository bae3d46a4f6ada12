"""Recurrent layers that PyTorch runs as one operation, opened up, and packed sequences.

Index legend: t time steps, b samples, h hidden units; gates i, f, g, o (input, forget, cell, output) lie side by side.
"""

from __future__ import annotations

import torch

from ..program import UnsupportedStructure
from .table import rule

_LSTM = 2   # oneDNN's number for it


@rule("MkldnnRnnLayerBackward0",
      saved="batch_sizes cx_ has_biases hx_ input mode result0 reverse weight0 weight1 weight2 weight3")
def lstm_layer(op, batch_sizes, cx, biased, hx, x, mode, y, reverse, weight_x, weight_h, bias_x, bias_h):
    """One direction of one layer of nn.LSTM: z = W x + V h + biases, c = f c + i g, h = o tanh c.

    The outputs are all states h, so that all gates follow from one product, and only c is followed in time.
    """
    if mode != _LSTM or batch_sizes:
        raise UnsupportedStructure("a recurrent layer of oneDNN that is not an LSTM over whole sequences")
    length, count, width = y.shape
    order = range(length - 1, -1, -1) if reverse else range(length)
    before = torch.cat([y[1:], hx.view(1, count, width)] if reverse else [hx.view(1, count, width), y[:-1]])
    gates = x.reshape(length * count, -1) @ weight_x.mT + before.reshape(length * count, -1) @ weight_h.mT
    if biased:
        gates = gates + (bias_x + bias_h)
    i, f, g, o = gates.view(length, count, 4, width).unbind(2)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    cells, last = [None] * length, cx.view(count, width)
    for t in order:
        cells[t] = last = torch.addcmul(i[t] * g[t], f[t], last)
    c = torch.stack(cells)
    first = cx.view(1, count, width)
    c_before = torch.cat([c[1:], first] if reverse else [first, c[:-1]])
    into_cell = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], 2)
    squashed = torch.tanh(c)
    through_cell, into_output = o * (1 - squashed * squashed), squashed * o * (1 - o)

    op.temporary("z", (length, count, 4, width))
    op.view("z", lambda t: t.view(length * count, 4 * width), out="rows")
    if op.needs[0]:
        op.reshape(0, (length * count, x.shape[2]), out="input")
        op.matmul("input", right=weight_x.mT, out="rows")
    for k, rows in ((1, x), (2, before)):
        if op.needs[k]:
            op.view(k, lambda w: w.mT, out="weight")
            op.matmul("weight", left=rows.reshape(length * count, -1), out="rows")
    for k in (3, 4):
        if op.needs[k]:
            op.add(k, out="rows")
    op.temporary("h", y.shape)
    op.temporary("c", y.shape)
    state = cell = None
    if op.needs[5]:
        op.reshape(5, (count, width), out="h before")
        state = "h before"
    if op.needs[6]:
        op.reshape(6, (count, width), out="c before")
        cell = "c before"
    for t in order:
        if state is not None:
            op.view("z", lambda z, t=t: z[t].flatten(1), out="z now")
            op.matmul(state, right=weight_h.mT, out="z now")
        op.view("z", lambda z, t=t: z[t, :, :3], out="into the cell")
        op.view("z", lambda z, t=t: z[t, :, 3], out="into the output")
        op.view("c", lambda c, t=t: c[t], out="c now")
        op.view("h", lambda h, t=t: h[t], out=f"h {t}")
        op.sum("into the cell", (1,), False, c=into_cell[t], out="c now")
        if cell is not None:
            op.scale(cell, f[t], out="c now")
        op.scale("into the output", into_output[t], out=f"h {t}")
        op.scale("c now", through_cell[t], out=f"h {t}")
        op.view("c now", lambda c: c, out="c before")
        state, cell = f"h {t}", "c before"
    op.view("h", lambda h: h)
    op.view("h", lambda h: h[order[-1]], out=1)
    op.view("c", lambda c: c[order[-1]], out=2)


@rule("PackPaddedSequenceBackward0", saved="batch_first input_sym_sizes result1", shape=True)
def pack_padded(op, batch_first, sizes, going_on, shape, device):
    """The steps of all sequences that go on, time after time; going_on: how many do."""
    numbers = torch.arange(sizes[0] * sizes[1]).view(sizes[0], sizes[1])
    numbers = numbers.mT if batch_first else numbers
    op.gather(0, torch.cat([numbers[t, :count] for t, count in enumerate(going_on.tolist())]).to(device), 2)
