"""A user's script that touches every public name."""
import torch
import torch.nn.functional as F

import pgdfast

model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
x = torch.linspace(-1, 1, 20)[:, None]
y = torch.sin(5 * x)


def closure() -> torch.Tensor:
    return F.mse_loss(model(x), y)


opt = pgdfast.LM(
    model.parameters(), lr=1.0, damping=1e-2, damping_rule="gain-ratio", acceleration="chord", scaling="marquardt",
    weight_decay=0.0, solver="auto", line_search=None, cg=pgdfast.CG(max_iterations=10), rcond=1e-8, backend="auto",
    momentum=0.0, norm_constraint=None,
)
loss: torch.Tensor = opt.step(closure)
mu: float = opt.report.damping
text: str = opt.report.status + opt.report.advice + str(opt.report)
rho: float | None = opt.report.gain_ratio
seconds: float = opt.report.seconds["solve"]
state = opt.state_dict()
opt.load_state_dict(state)
opt2 = pgdfast.LM(model.parameters(), damping=lambda step: 0.1 / (step + 1), damping_rule="constant")


opt3 = pgdfast.LM(model.parameters(), memory=1e9, process_group=None)
loss = opt3.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), [(x, y)], progress=False)
parts: pgdfast.Linearization | pgdfast.Parts = pgdfast.linearize(lambda b: model(b), model.parameters(), batches=[x, x])
ranks: type[pgdfast.Ranks] = pgdfast.Ranks


class Mine(pgdfast.DampingRule):
    def accepted(self, mu: float, memory: dict[str, float], rho: float) -> tuple[float, dict[str, float]]:
        return mu / 3, memory

    def rejected(self, mu: float, memory: dict[str, float], rho: float, curvature: object) -> tuple[float, dict[str, float]]:
        return 2 * mu, memory


pgdfast.LM(model.parameters(), damping_rule=Mine(), line_search=pgdfast.Armijo())
for rule in (
    pgdfast.Auto(), pgdfast.Constant(), pgdfast.GainRatio(smallest=1e-3), pgdfast.Delayed(), pgdfast.Longest(target=0.25),
    pgdfast.Sweep(),
):
    pgdfast.LM(model.parameters(), damping_rule=rule)
for accel in (pgdfast.Geodesic(), pgdfast.Chord(rounds=3)):
    pgdfast.LM(model.parameters(), acceleration=accel)
balanced = pgdfast.LM(model.parameters(), balance=pgdfast.Balance("trace", every=5))
balanced.step(lambda: (model(x) - y, model(x[:1])))
weights: tuple[float, ...] = balanced.report.weights + balanced.report.terms
search: pgdfast.LineSearch = pgdfast.Armijo()
correction: pgdfast.Acceleration = pgdfast.Chord()

networks = pgdfast.functional_ensemble(model, 4)
many = pgdfast.LM(networks.parameters(), ensemble=4)
losses: torch.Tensor = many.step(lambda: ((networks(x) - y) ** 2).mean((1, 2)))
report: pgdfast.EnsembleReport = many.report
first: pgdfast.Report = many.report[0]
dampings: list[float] = many.report.damping
count: int | None = many.ensemble
ensemble: pgdfast.Ensemble = networks
member: torch.nn.Module = networks.member(0)

lin: pgdfast.Linearization = pgdfast.linearize(closure, model.parameters())
v = torch.zeros(lin.num_parameters)
u: torch.Tensor = lin.jvp(v) + lin.residual
g: torch.Tensor = lin.vjp(u) + lin.ggn(v) + lin.gradient() + lin.diagonal()
J: torch.Tensor = lin.dense() @ lin.dense().T + lin.gram()
solution: pgdfast.Solution = pgdfast.solve(lin, 0.1)
step: torch.Tensor = solution.step + solution.solve_with_same_factor(u)
sketched = pgdfast.CG(preconditioner=pgdfast.Nystrom(rank=5))
solutions: pgdfast.Solutions = pgdfast.solve(lin, [0.1, 1.0], solver="cg", cg=sketched)
status: tuple[str, ...] = solutions.status

hybrid = pgdfast.Hybrid(pgdfast.LM(model.parameters()), torch.optim.Adam(model.parameters()), switch=pgdfast.Plateau())
hybrid.step(closure)
pgdfast.Hybrid(pgdfast.LM(model.parameters()), torch.optim.Adam(model.parameters()), switch=2000)


def probe() -> torch.Tensor:
    return torch.as_tensor(model(x))


drift = pgdfast.KernelDrift(probe, 0.1)
align = pgdfast.Alignment(probe, y)
spectrum: pgdfast.Spectrum = pgdfast.ntk_spectrum(closure, model.parameters())
history: pgdfast.SpectrumHistory = pgdfast.SpectrumHistory(closure, list(model.parameters()))
K = torch.eye(3)
a: float = pgdfast.kernel_alignment(K, torch.ones(3)) + pgdfast.kernel_drift(K, K)
captured = pgdfast.CapturedStep(opt2, closure)
loss2: torch.Tensor = captured.step()
value, (u_x,), lap = pgdfast.pde.laplacian(model, x)
reference = pgdfast.reference.linearize(closure, list(model.parameters()))
info: dict[str, str] = {**pgdfast.build_info(), **pgdfast.backends()}
version: str = pgdfast.__version__
