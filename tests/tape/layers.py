"""Operations of whole layers as functions of parameters a (3, 4), b (3, 4), c (4,), m (4, 5), for test_tape_rules."""

import torch
import torch.nn.functional as F
from helpers import gradient, rand

aten = torch.ops.aten
SIGNAL, IMAGE = rand(2, 2, 7, seed=1), rand(2, 1, 4, 5, seed=2)
TABLE = torch.tensor([[1, 2, 2], [0, 1, 2], [2, 2, 2]])
RAGGED, STARTS = torch.tensor([1, 2, 0, 0, 2]), torch.tensor([0, 2, 2])
LENGTHS = torch.tensor([3, 1])


def statistics(x):
    """A running mean and variance for its channels."""
    return rand(x.shape[1], seed=6), rand(x.shape[1], seed=7).abs() + 0.5


def normal(x, *given, **options):
    """F.batch_norm in training, on a tensor that is more than its statistics."""
    return F.batch_norm(torch.sinh(x), None, None, *given, training=True, **options)


def nested(convolution):
    """First derivatives by input, weight and bias, and a second one."""

    def function(a, b, c, m):
        y = torch.tanh(convolution(a, b, c, m))
        first = gradient(y, b)
        return first, gradient(y * y, a), gradient(y * y, c), gradient(first * first, b)

    return function


def bags(weight, mode, weights=None, **options):
    """Bags of equal and of different lengths."""
    some = None if weights is None else weights.flatten()[:5]
    return (
        F.embedding_bag(TABLE, weight, mode=mode, per_sample_weights=weights, **options),
        F.embedding_bag(RAGGED, weight, STARTS, mode=mode, per_sample_weights=some, **options),
    )


CONVOLUTIONS = {
    "conv1d": lambda a, b, c, m: (
        F.conv1d(b.view(1, 2, 6), a.view(3, 2, 2), c[:3]),
        F.conv1d(SIGNAL, a.view(3, 2, 2), c[1:], stride=2, padding=1, dilation=2),
        F.conv1d(b.view(1, 2, 6), SIGNAL[..., :3], padding=4),
        F.conv1d(b.view(1, 2, 6), m.view(2, 2, 5)),
        F.conv1d(torch.sin(b).view(2, 1, 6), a.view(6, 1, 2), stride=2),
        F.conv1d(b.T.reshape(1, 2, 6), a.view(3, 2, 2), stride=3),
    ),
    "conv1d in groups": lambda a, b, c, m: (
        F.conv1d(b.view(1, 2, 6), a.view(6, 1, 2), a.view(-1)[:6], groups=2, stride=2),
        F.conv1d(torch.sin(b).view(1, 4, 3), m.view(4, 1, 5), c, groups=4, padding=2),
        F.conv1d(SIGNAL, m.view(10, 1, 2), groups=2),
    ),
    "conv2d": lambda a, b, c, m: (
        F.conv2d(b.view(1, 1, 3, 4), a.view(3, 1, 2, 2), c[:3]),
        F.conv2d(IMAGE, a.view(1, 1, 3, 4), stride=(1, 2), padding=(1, 0)),
        F.conv2d(torch.sin(b).view(1, 2, 3, 2), a.view(2, 1, 3, 2), groups=2, padding=1, dilation=(1, 2)),
        F.conv2d(b.view(1, 1, 2, 6), a.view(3, 1, 2, 2), stride=2),
        F.conv2d(b.view(2, 3, 2).sin(), a.view(1, 2, 3, 2)[..., :1]),
    ),
    "conv3d": lambda a, b, c, m: (
        F.conv3d(b.view(1, 1, 2, 2, 3), a.view(3, 1, 2, 2, 1), c[:3], padding=(1, 0, 1)),
        F.conv3d(torch.sin(b).view(1, 2, 2, 1, 3), a.view(2, 1, 2, 1, 3), groups=2, padding=1, stride=2),
    ),
    "transposed convolutions": lambda a, b, c, m: (
        F.conv_transpose1d(b.view(1, 2, 6), a.view(2, 3, 2), c[:3]),
        F.conv_transpose1d(SIGNAL, m.view(2, 2, 5), stride=2, padding=1, output_padding=1, groups=2),
        F.conv_transpose1d(torch.sin(b).view(1, 2, 6), a.view(2, 2, 3), stride=2, dilation=2, groups=2),
        F.conv_transpose2d(b.view(1, 1, 3, 4), a.view(1, 3, 2, 2), stride=2),
        F.conv_transpose2d(IMAGE, a.view(1, 1, 3, 4), c[:1], padding=1),
        F.conv_transpose3d(b.view(1, 1, 2, 2, 3), a.view(1, 3, 2, 2, 1)),
    ),
    "derivatives of conv1d": nested(
        lambda a, b, c, m: F.conv1d(b.view(1, 2, 6), a.view(6, 1, 2), a[:2, :3].flatten(), groups=2)),
    "derivatives of conv2d": nested(lambda a, b, c, m: F.conv2d(b.view(1, 1, 3, 4), a.view(3, 1, 2, 2), c[:3], padding=1)),
    "derivatives of a transposed convolution": nested(
        lambda a, b, c, m: F.conv_transpose1d(b.view(1, 2, 6), a.view(2, 3, 2), c[:3], stride=2)),
    "derivatives of a constant kernel": lambda a, b, c, m: gradient(F.conv1d(b.view(1, 2, 6), SIGNAL[..., :2]) ** 3, b),
    "average pools": lambda a, b, c, m: (
        F.avg_pool1d(b, 2),
        F.avg_pool1d(b, 3, 2, 1, True),
        F.avg_pool2d(b.view(1, 3, 4), 2, 1),
        F.avg_pool2d((a * b).view(1, 1, 3, 4), (3, 2), 2, 1, True),
        F.avg_pool2d(b.view(1, 3, 4), 3, 1, 1, False, False),
        F.avg_pool2d(m.view(1, 4, 5), 2, divisor_override=3),
        F.avg_pool3d(b.view(1, 2, 2, 3), (1, 2, 2), 1),
        F.avg_pool3d(b.view(1, 2, 2, 3), 2, 2, 1, True, False),
    ),
    "adaptive pools": lambda a, b, c, m: (
        F.adaptive_avg_pool1d(b, 2),
        F.adaptive_avg_pool1d(b, 3),
        F.adaptive_avg_pool2d((a * b).view(1, 3, 4), (2, 3)),
        F.adaptive_avg_pool2d(m.view(1, 1, 4, 5), (2, 5)),
        F.adaptive_avg_pool3d(b.view(1, 2, 2, 3), (1, 2, 3)),
        F.adaptive_avg_pool3d(m.view(1, 2, 2, 5), (2, 1, 3)),
    ),
    "derivatives of averages": lambda a, b, c, m: tuple(gradient(y**3, b) for y in (
        F.avg_pool2d((a * b).view(1, 1, 3, 4), 2, 1),
        F.avg_pool2d(b.view(1, 3, 4), (3, 2), 2, 1, True, False),
        F.avg_pool3d((a * b).view(1, 2, 2, 3), (1, 2, 2), 1),
        F.adaptive_avg_pool2d((a * b).view(1, 3, 4), (2, 3)),
        F.adaptive_avg_pool2d(b.view(1, 3, 4), (3, 2)),
        F.adaptive_avg_pool3d((a * b).view(1, 2, 2, 3), (2, 1, 2)),
    )) + (gradient(F.avg_pool2d(b.view(1, 3, 4), 2), b) + gradient(F.adaptive_avg_pool2d(b.view(1, 3, 4), (3, 2)), b),),
}
STATISTICS = {
    "batch_norm": lambda a, b, c, m: (
        normal(a, c, b[0]),
        normal(m.T @ a.T, c[:3]),
        normal(a.view(3, 2, 2)),
        F.batch_norm(rand(5, 4), None, None, c, training=True),
    ),
    "batch_norm by running statistics": lambda a, b, c, m: (
        F.batch_norm(a, *statistics(a), c, b[0], training=False),
        F.batch_norm(a.view(3, 2, 2), *statistics(a.view(3, 2, 2)), eps=0.1),
    ),
    "instance_norm": lambda a, b, c, m: (
        F.instance_norm(a.view(2, 2, 3), weight=c[:2], bias=b[0, :2]),
        F.instance_norm(m.view(2, 2, 5)),
    ),
    "group_norm": lambda a, b, c, m: (
        F.group_norm(m.view(1, 4, 5), 2, c, b[0]),
        F.group_norm(a.view(2, 2, 3), 1),
        F.group_norm(a.T.reshape(1, 4, 3), 4, c),
        F.group_norm(rand(2, 4, 3), 2, c, b[1]),
    ),
    "derivatives of batch_norm": lambda a, b, c, m: (
        gradient(normal(a, c, b[0]) ** 3, a),
        gradient(normal(a.view(3, 2, 2) * b.view(3, 2, 2)) ** 3, b),
        gradient(normal(rand(5, 4) * b[0], c) ** 3, b),
        gradient(F.batch_norm(a, *statistics(a), c, b[0]) ** 3, a),
        gradient(F.batch_norm(a, *statistics(a)) ** 3, a),
        gradient(F.batch_norm(a * b, *statistics(a), c).sum(), a),
        gradient(F.batch_norm(a * a, *statistics(a)).sum(), a),
    ),
    "derivatives of layer_norm": lambda a, b, c, m: (
        gradient(F.layer_norm(torch.sinh(a), (4,), c, m[:, 0]) ** 3, a),
        gradient(F.layer_norm(a.view(3, 2, 2) * b.view(3, 2, 2), (2, 2)) ** 3, b),
        gradient(F.layer_norm(a, (4,), c) * b, a),
    ),
    "weight_norm": lambda a, b, c, m: (
        torch._weight_norm(a, b[:, :1], 0),
        torch._weight_norm(a.view(3, 2, 2), c[:2].view(1, 1, 2), 2) * 2,
        torch._weight_norm(rand(3, 4), b[:, :1], 0),
    ),
}
PRODUCTS = {
    "bilinear forms": lambda a, b, c, m: (
        F.bilinear(a, torch.sin(b), m[:, :4].reshape(1, 4, 4), c[:1]),
        F.bilinear(rand(3, 2), rand(3, 5, seed=1), m.view(2, 2, 5)),
        F.bilinear(a, b, rand(2, 4, 4)),
    ),
    "embedding_bag": lambda a, b, c, m: (*bags(a, "sum"), *bags(2 * b, "sum", padding_idx=2), *bags(a, "sum", b[:, :3])),
    "embedding_bag by means": lambda a, b, c, m: (*bags(a, "mean"), *bags(b, "mean", padding_idx=2)),
    "embedding_bag by maxima": lambda a, b, c, m: (*bags(a, "max"), *bags(b, "max", padding_idx=2)),
    "embedding_bag with a last offset": lambda a, b, c, m: F.embedding_bag(
        RAGGED, a, torch.tensor([0, 2, 5]), mode="mean", include_last_offset=True),
}
RECURRENT = {
    "unsafe_split": lambda a, b, c, m: (*torch.unsafe_split(a, 3, 1), *torch.unsafe_split_with_sizes(m, (1, 3), 0)),
    "transpose in place": lambda a, b, c, m: (2.0 * a).transpose_(0, 1) * b.T,
    "packed sequences": lambda a, b, c, m: (
        torch._pack_padded_sequence(torch.sin(a).view(3, 2, 2), LENGTHS, False)[0],
        torch._pack_padded_sequence(b.view(2, 3, 2), LENGTHS, True)[0],
    ),
}
ATTENTION = {
    "attention with shared heads": lambda a, b, c, m: (
        F.scaled_dot_product_attention(
            a.view(1, 2, 3, 2), b.view(1, 2, 3, 2)[:, :1], torch.tanh(m[:, :3]).reshape(1, 1, 3, 4), enable_gqa=True),
        F.scaled_dot_product_attention(
            torch.sin(a).view(1, 3, 2, 2), rand(1, 1, 4, 2), m[:, :4].reshape(1, 1, 4, 4), rand(1, 3, 2, 4, seed=1),
            enable_gqa=True),
        F.scaled_dot_product_attention(
            rand(2, 4, 3, 2), b.view(2, 2, 3, 1).expand(2, 2, 3, 2), rand(2, 2, 3, 2), is_causal=True, enable_gqa=True),
    ),
}
LAYERS = ATTENTION | CONVOLUTIONS | STATISTICS | PRODUCTS | RECURRENT


def lstm_layer():
    """A result with oneDNN's own node, which is there in float32 alone."""
    return torch.nn.LSTM(2, 3)(rand(2, 1, 2, dtype=torch.float32))[0]
