"""Transformers on the tape: whole layers against the reference, changing indices, and what still falls back."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, agreement, jacobian_agreement, perturb, rand, relative
from torch import nn

import pgdfast
from pgdfast import reference
from pgdfast.linear import Linearizer

CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
PADDING = torch.tensor([[False, False, True], [False, True, False]])
TOKENS, CLASSES = torch.tensor([[1, 0, 3], [5, 4, 3]]), torch.tensor([2, 4])


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def seeded(make, dtype=torch.float64):
    """A module whose parameters come from seeds of their own."""
    module = make().to(dtype)
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(0.5 * rand(*p.shape, seed=k + 20) + (p.dim() == 1))
    return module


def encoder(**options):
    return lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)


class Language(nn.Module):
    """Tokens to logits: embedding, one post-norm layer, an untied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer = encoder(batch_first=True)()
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        mask = CAUSAL.to(self.embed.weight.dtype)
        return self.head(self.layer(self.embed(tokens), src_mask=mask, is_causal=True))


X = rand(2, 3, 4, seed=1)
MODULES = {
    "encoder layer": (encoder(batch_first=True), lambda f: f(X)),
    "encoder layer, sequence first": (encoder(), lambda f: f(X)),
    "encoder layer, causal": (encoder(batch_first=True), lambda f: f(X, src_mask=CAUSAL, is_causal=True)),
    "encoder layer, padded": (encoder(batch_first=True), lambda f: f(X, src_key_padding_mask=PADDING)),
    "encoder layer, norm first": (
        encoder(batch_first=True, norm_first=True, activation="gelu", bias=False),
        lambda f: f(X),
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        lambda f: f(X, X.flip(1), tgt_mask=CAUSAL),
    ),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda f: f(X, X, X)[0]),
    "attention without weights": (
        lambda: nn.MultiheadAttention(4, 2, bias=False),
        lambda f: f(X, X, X, need_weights=False)[0],
    ),
    "attention to others": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        lambda f: f(X, X[..., :3], X[..., 1:3])[0],
    ),
    "attention weights": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda f: f(X, X, X)[1]),
    "language model": (Language, lambda f: f(TOKENS)),
    "language model, last token": (Language, lambda f: f(TOKENS)[:, -1]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_module_agrees_with_the_reference(name, backend):
    make, call = MODULES[name]
    module = seeded(make)
    params = list(module.parameters())
    linearizer = Linearizer(params, backend)
    for visit in range(2):
        assert jacobian_agreement(linearizer, lambda: call(module), params, seed=visit) < 1e-11
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1


LOSSES = {
    "last token": lambda z: F.cross_entropy(z[:, -1], CLASSES),
    "all tokens": lambda z: F.cross_entropy(z.transpose(1, 2), TOKENS.clamp_max(4)),
    "all tokens in a row": lambda z: F.cross_entropy(z.reshape(-1, 5), TOKENS.clamp_max(4).view(-1)),
    "ignored tokens": lambda z: F.cross_entropy(z.view(-1, 5), torch.where(PADDING, -100, TOKENS % 5).view(-1)),
    "ignored class": lambda z: F.cross_entropy(z.transpose(1, 2), TOKENS % 5, ignore_index=2),
    "label smoothing": lambda z: F.cross_entropy(
        z.view(-1, 5), torch.where(PADDING, -100, TOKENS % 5).view(-1), label_smoothing=0.1
    ),
    "smoothed sum": lambda z: F.cross_entropy(z.transpose(1, 2), TOKENS % 5, label_smoothing=0.2, reduction="sum"),
    "weighted": lambda z: F.cross_entropy(
        z.view(-1, 5), TOKENS.view(-1) % 5, weight=torch.tensor([1, 2, 0.5, 1, 3]).double(), label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_of_a_language_model(name):
    model = seeded(Language)
    params = list(model.parameters())
    linearizer = Linearizer(params)
    for visit in range(2):
        assert agreement(linearizer, lambda: LOSSES[name](model(TOKENS)), params, seed=visit) < 1e-10
        perturb(params, seed=visit)
    assert len(linearizer._plans) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_as_good_as_float32_can_be(backend):
    model, exact = seeded(Language, torch.float32), seeded(Language)
    params = list(model.parameters())
    lin = Linearizer(params, backend)(lambda: F.cross_entropy(model(TOKENS)[:, -1], CLASSES))
    ref = reference.linearize(lambda: F.cross_entropy(exact(TOKENS)[:, -1], CLASSES), list(exact.parameters()))
    v = rand(lin.num_parameters)
    assert relative(lin.ggn(v.float()), ref.ggn(v)) < 1e-5
    assert relative(lin.gradient(), ref.vjp(ref.residual)) < 1e-5
    assert relative(lin.widened().ggn(v), ref.ggn(v)) < 1e-5


BATCHES = [torch.tensor(ids) for ids in ([[0, 1], [2, 3], [4, 5]], [[1, 1], [1, 1], [1, 1]], [[5, 0], [0, 5], [3, 3]])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, 1])
def test_minibatches_share_a_plan(backend, padding):
    table, head = rand(6, 4, seed=1).requires_grad_(), rand(4, 2, seed=2).requires_grad_()
    params = [table, head]
    linearizer = Linearizer(params, backend)
    for ids in BATCHES:
        def closure(ids=ids):
            return torch.tanh(F.embedding(ids, table, padding_idx=padding).sum(1) @ head)

        assert jacobian_agreement(linearizer, closure, params) < 1e-12
    assert len(linearizer._plans) == 1


PICKS = [torch.tensor(ids) for ids in ([0, 1, 2], [2, 1, 0], [1, 1, 1], [0, 0, 2], [0, 1, 2])]
PICKERS = {
    "index": lambda h, ids: h[ids],
    "index_select": lambda h, ids: h.index_select(0, ids),
    "index of pairs": lambda h, ids: h[ids, ids + 1],
    "gather": lambda h, ids: h.gather(0, ids[:, None].expand(-1, 4)),
    "embedding": lambda h, ids: F.embedding(ids, h),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PICKERS)
def test_rows_follow_indices_into_the_workspace(name, backend):
    """Which residuals share an element depends on the indices: one plan, a row structure for each."""
    w = rand(5, 4, seed=1).requires_grad_()
    x = rand(3, 5, seed=2)
    linearizer = Linearizer([w], backend)
    for ids in PICKS:
        def closure(ids=ids):
            return torch.tanh(PICKERS[name](torch.tanh(x @ w), ids))

        assert jacobian_agreement(linearizer, closure, [w]) < 1e-12
    assert len(linearizer._plans) == 1


def test_distinct_rows_keep_their_row_structure_and_shared_ones_are_joined():
    w, x = rand(5, 4, seed=1).requires_grad_(), rand(3, 5, seed=2)
    linearizer = Linearizer([w])

    def rows(ids):
        layout = linearizer(lambda: (x @ w)[torch.tensor(ids)]).row_layout()
        return layout.num_rows, layout.max_outputs

    assert rows([2, 0, 1]) == (12, 1)
    assert rows([1, 1, 2]) == (8, 2)
    assert rows([0, 2, 1]) == (12, 1)


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_steps_over_changing_picks(solver):
    """Every solver over a plan whose row structure comes and goes."""
    w, x, y = rand(5, 4, seed=1).requires_grad_(), rand(3, 5, seed=2), rand(3, 4, seed=3)
    linearizer = Linearizer([w])
    options = pgdfast.CG(max_iterations=500, tolerance=1e-13)
    for ids in PICKS:
        def closure(ids=ids):
            return torch.tanh(x @ w)[ids] - y

        step = pgdfast.solve(linearizer(closure), 0.1, solver=solver, cg=options).step
        ref = reference.linearize(closure, [w])
        J = ref.dense()
        exact = torch.linalg.solve(J.T @ J + 0.1 * torch.eye(20, dtype=torch.float64), J.T @ ref.residual)
        assert relative(step, exact) < 1e-9


def test_positions_outside_of_a_tensor_are_refused():
    """The core checks positions when it binds them; PyTorch itself would have refused these before."""
    w = rand(4, 2).requires_grad_()
    lin = Linearizer([w], "native")(lambda: F.embedding(torch.tensor([0, 3]), w))
    lin._constants = [torch.tensor([0, 4]), *lin._constants[1:]]
    with pytest.raises(IndexError, match="a position outside of its tensor"):
        lin.jvp(rand(8))


def test_training_a_small_language_model():
    model = seeded(Language, torch.float32)
    opt = pgdfast.LM(model.parameters(), solver="cg", cg=pgdfast.CG(max_iterations=20))
    losses = [float(opt.step(lambda: F.cross_entropy(model(TOKENS)[:, -1], CLASSES))) for _ in range(8)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "name, call",
    [
        ("embedding with scale_grad_by_freq", lambda w: F.embedding(TOKENS[:, :2], w, scale_grad_by_freq=True)),
        ("dropout that dropped nothing", lambda w: torch.native_dropout(w, 0.3, False)[0]),
    ],
)
def test_what_has_no_rule_says_so(name, call, monkeypatch):
    monkeypatch.setattr(pgdfast.linear.linearization, "_announced", set())
    w = rand(6, 2).requires_grad_()
    with pytest.warns(UserWarning, match=name):
        lin = pgdfast.linearize(lambda: call(w), [w])
    assert relative(lin.dense(), reference.linearize(lambda: call(w), [w]).dense()) < 1e-12


def test_products_repeat_bit_for_bit():
    model = seeded(Language, torch.float32)
    params = list(model.parameters())
    tokens = torch.randint(0, 6, (600, 3), generator=torch.Generator().manual_seed(1))
    lin = Linearizer(params, "native")(lambda: model(tokens))
    v = rand(lin.num_parameters, dtype=torch.float32)
    first = lin.ggn(v)
    assert all(torch.equal(lin.ggn(v), first) for _ in range(5))
