"""A PINN on several processes: each has points of its own, and every step is LM's on all points together.

    torchrun --nproc-per-node 2 examples/ddp_poisson.py --check
    python examples/ddp_poisson.py      # one process, all points: the same losses
    torchrun --nproc-per-node 4 examples/ddp_poisson.py --resume poisson.pt

-Lap u = f on the unit square, u = 0 on its boundary. With GPUs, each process takes one.
"""

import argparse
import copy
import math
import os

import torch
import torch.distributed as dist

import pgdfast

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=20)
options.add_argument("--points", type=int, default=900, help="inside the square, of all processes together")
options.add_argument("--save", default="poisson.pt")
options.add_argument("--resume", help="checkpoint to go on from, of any number of processes")
options.add_argument("--check", action="store_true", help="take the same steps in one process, and compare")
options = options.parse_args()
# 1. One process of several, or the only one. torchrun tells by the environment.
alone = "RANK" not in os.environ
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
if not alone:
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
rank, size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
# 2. The same model everywhere: equal seeds. (LM compares the parameters, and says where they differ.)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
layers = torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
model = torch.nn.Sequential(*layers).to(device)
# 3. Rows of its own in every process: here every size-th point. Equal numbers are not needed.
points, edge = torch.rand(options.points, 2), torch.rand(120, 2)
edge[torch.arange(120), torch.arange(120) % 2] = (torch.arange(120) // 2 % 2).to(edge.dtype)
inside, boundary = points[rank::size].to(device), edge[rank::size].to(device)


def loss_on(model, inside, boundary):
    """The loss on these points; the step is that of the means over all processes' points."""
    source = 2 * math.pi**2 * torch.sin(math.pi * inside).prod(1, keepdim=True)   # u = sin(pi x) sin(pi y)
    residual = pgdfast.pde.laplacian(model, inside).laplacian + source
    return residual.square().mean() + 100 * model(boundary).square().mean()


# 4. The one line that changes: process_group. A DistributedDataParallel model works, too, but nothing here needs it.
optimizer = pgdfast.LM(model.parameters(), process_group=None if alone else dist.group.WORLD)
if options.resume:
    state = torch.load(options.resume, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
twin, start = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
for step in range(1, options.steps + 1):
    loss = optimizer.step(lambda: loss_on(model, inside, boundary))   # same decision, same parameters, bit for bit, everywhere
    if rank == 0:
        print(f"step {step:3d}  loss {float(loss):.6e}  {optimizer.report.status}, {optimizer.report.solver}", flush=True)
        if step % 10 == 0 or step == options.steps:   # one process writes; all load
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, options.save)

if options.check and rank == 0:   # the same steps by this process alone, on all points
    single, points, edge = pgdfast.LM(twin.parameters()), points.to(device), edge.to(device)
    single.load_state_dict(start)
    for _ in range(options.steps):
        single.step(lambda: loss_on(twin, points, edge))
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    print(f"largest difference of a parameter from one process with all points: {apart:.1e}")
if rank == 0:
    x = torch.rand(9000, 2).to(device)
    error = (model(x) - torch.sin(math.pi * x).prod(1, keepdim=True)).square().mean().sqrt()
    print(f"{size} processes: root mean square error {error.item():.1e}")
if not alone:
    dist.destroy_process_group()
