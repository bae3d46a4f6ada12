"""Cases of complex numbers between real ones: functions of parameters a (3, 4), b (3, 4), c (4,), m (4, 5)."""

import torch
import torch.nn.functional as F
from helpers import rand
from tape.cases_selection import IDS, MASK, PLACES

C = rand(3, 4, seed=9)   # a constant
W = torch.complex(rand(3, 4, seed=10), rand(3, 4, seed=11))


def reals(*results):
    """Complex results as residuals."""
    return tuple(torch.view_as_real(z.resolve_conj()) if z.is_complex() else z for z in results)


def number(a, b):
    """A complex number of two real ones."""
    return torch.complex(a, torch.tanh(b))


def written(z, index, value):
    """Z with value written in place."""
    z = 1.0 * z
    z[index] = value
    return z


def spectral(a, b, c, m):
    """A spectral layer: transform, a product per mode with complex weights, the rest zero, transform back."""
    modes = torch.fft.rfft(torch.tanh(a @ m).view(3, 1, 5))
    out = torch.zeros(3, 2, 3, dtype=torch.complex128)
    weights = torch.view_as_complex(torch.stack([b[:2, :2], b[1:, 2:]], -1))
    out[:, :, :2] = torch.einsum("bim,om->bom", modes[:, :, :2], weights)
    return torch.fft.irfft(out, n=5)


COMPLEX = {
    "complex parts": lambda a, b, c, m: reals(
        number(a, b), torch.polar(a, b), number(a, b).real, number(a, b).imag, number(a, b).conj().imag, a.to(torch.complex128),
        torch.view_as_complex(a.view(3, 2, 2)), number(a, b).conj(),
        number(a, b).to(torch.complex64).to(torch.complex128) * 0 + W * a,
        torch.conj_physical(number(a, b))),
    "complex arithmetic": lambda a, b, c, m: reals(
        number(a, b) + W, number(a, b) - c, number(a, b) * W, number(a, b) * number(b, a), W / number(a, b + 3), a * W,
        c * number(a, b),
        number(a, b) / 3, (2 - 1j) * number(a, b), 1 - number(a, b), -number(a, b), number(a, b) ** 2,
        torch.rsub(number(a, b), 1j),
        torch.where(MASK, number(a, b), W), number(a, b).masked_fill(MASK, 0)),
    "complex functions": lambda a, b, c, m: reals(
        number(a, b).abs(), number(a, b).angle(), torch.exp(number(a, b)), torch.log(number(a, b)), torch.sqrt(number(a, b)),
        torch.sgn(number(a, b)), torch.tanh(number(a, b)), torch.sin(number(a, b)), torch.sigmoid(number(a, b)),
        1 / number(a, b),
        torch.cosh(number(a, b)), (number(a, b) * number(a, b).conj()).real, number(a, b).abs().square()),
    "complex structure": lambda a, b, c, m: reals(
        number(a, b).T, number(a, b).reshape(4, 3), number(a, b)[1:, ::2], number(a, b).sum(0), number(a, b).mean(1),
        torch.cat([number(a, b), W, number(b, a)], 1), torch.stack([number(a, b), W]), number(a, b).roll(1, 1),
        number(a, b).flip(0),
        number(a, b)[IDS], number(a, b).gather(1, PLACES), number(a, b).unsqueeze(1).expand(3, 2, 4),
        F.pad(number(a, b), (1, 2)),
        number(a, b).diagonal(), *number(a, b).unbind(1)[:2],
        torch.fft.fftshift(number(a, b)), number(a, b).index_add(0, IDS[0], number(b, a)), number(a, b)[MASK]),
    "complex writes": lambda a, b, c, m: reals(
        written(number(a, b), 0, number(c, c)), written(number(a, b), (slice(None), 1), number(b, a)[:, 0]),
        written(W, (1, slice(2)), number(a, b)[0, :2]),
        torch.block_diag(number(a, b), number(c, c)), number(a, b).cumsum(1), written(number(a, b), 0, number(a, b)[0, 1]),
        written(number(a, b), MASK, 0), written(number(a, b), IDS[0], number(b, a)[:1])),
    "complex products": lambda a, b, c, m: reals(
        number(a, b) @ W.T, W @ number(m, 2 * m), number(a, b) @ number(m, m), torch.einsum("ij,kj->ik", number(a, b), W),
        number(a, b) @ W[0], W @ number(c, c), torch.bmm(number(a, b).view(3, 2, 2), W.view(3, 2, 2)),
        torch.dot(number(c, c), W[0]).view(1),
        torch.vdot(number(c, c), number(c, 2 * c)).view(1), torch.addmm(number(a, b), W, number(m, m)[:, :4], alpha=0.3,
        beta=2),
        torch.baddbmm(number(a, b).view(3, 2, 2), number(b, a).view(3, 2, 2), W.view(3, 2, 2)),
        torch.linalg.vector_norm(number(a, b), dim=1), number(a, b).norm(dim=0, keepdim=True)),
    "Fourier transforms": lambda a, b, c, m: reals(
        torch.fft.fft(a), torch.fft.rfft(a), torch.fft.rfft(m, dim=0), torch.fft.fft(number(a, b), norm="ortho"),
        torch.fft.ifft(number(a, b)),
        torch.fft.ihfft(a), torch.fft.hfft(number(a, b)), torch.fft.irfft(number(a, b)),
        torch.fft.irfft(number(a, b), n=5, norm="ortho"),
        torch.fft.rfft2(m), torch.fft.fft2(number(a, b)), torch.fft.irfft2(number(a, b), s=(3, 5)),
        torch.fft.fftn(a.view(3, 2, 2)),
        torch.fft.ifftn(number(a, b).view(3, 2, 2), dim=(0, 2)), torch.fft.rfft(a, n=7),
        torch.fft.fft(number(a, b), n=3, dim=0)),
    "spectral layer": spectral,
    "spectrum": lambda a, b, c, m: (torch.fft.rfft(torch.tanh(a @ m)).abs(), torch.view_as_real(torch.fft.fft(b)) ** 2),
}
