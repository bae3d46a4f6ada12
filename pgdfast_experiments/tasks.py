"""The experiments: one file each, and this table.

A new task is one file and one line in `TASKS`; differential equations lie in `pde`, and what they share in its `worked`.
Its module has these names:

    NAME, SUMMARY          its name on the command line, and a paragraph for `--help`
    SOURCE, PAPER          which figure it stands for, and what the paper reports there
    KNOWN, RATES           names of the optimizers it takes, and their learning rates
    DEFAULTS, QUICK        values of the options, and those that `--quick` puts in their place
    add_options(parser)    options of its own, beside those of every task (`options.add_common`)
    cases(settings)        the runs to be made: a list of `training.Case`
    summarize(runs, settings), judge(summary, settings)      numbers, and checks made from them alone
    table(summary, settings), pictures(runs, summary, settings), describe(settings)      what is shown and recorded
    problem(dtype, seed)   what `pgdfast verify` compares the backends on

and optionally extra(settings): figures measured beside the runs; and ENSEMBLES = True where cases may be trained `together`.
`experiment` puts them together.
What the tasks share lies beside them: `options` (command-line values), `methods` (optimizers by
name), `models`, `training` (the loop, its clock, minibatches),
`together` (the loop of an ensemble), `checkpoints`, `measures` (Fourier modes, decay fits,
checks), `records` (CSV, JSON, all-or-nothing writing), `locks` (one run in a folder), `plotting` and `terminal`.
Tasks use the public names of pgdfast alone, as any user would.
"""

import importlib

TASKS = {
    "regression-1d": ("regression_1d", "three sines by a tanh network: the error by Fourier mode"),
    "regression-2d": ("regression_2d", "a checkerboard by a tanh network: the error by 2-D Fourier mode"),
    "poisson-pinn": ("poisson_pinn", "Poisson's equation at three frequencies by a physics-informed network"),
    "modular-mlp": ("modular_mlp", "a + b mod 23 by a quadratic network: grokking at several scales"),
    "polynomial": ("polynomial", "a quadratic target by a nearly linear network: from rich to lazy"),
    "transformer": ("transformer", "a + b mod 97 by a transformer: GGN steps, Adam, and a hybrid"),
    "mnist": ("mnist", "digits from few images and large weights: grokking, and a hybrid"),
    "poisson-2d": ("pde.poisson_2d", "Poisson's equation by two physics-informed networks, against the clock"),
    "heat-1d": ("pde.heat_1d", "the heat equation on an interval"),
    "burgers": ("pde.burgers", "Burgers' equation at viscosity 0.01 / pi: a steep layer"),
    "helmholtz": ("pde.helmholtz", "a wave of wave number 4 pi in a square"),
    "inverse-heat": ("pde.inverse_heat", "a diffusivity from temperatures with 1 % noise"),
}

ALL = {**{name: (name,) for name in TASKS}, "mnist-cross-entropy": ("mnist", "--loss", "cross-entropy")}
"""What `pgdfast run all` runs, in order: by the name of its result files, the task and options that make them."""


def load(name):
    """Import the module of the task `name`, a key of `TASKS`."""
    module, _ = TASKS[name]
    return importlib.import_module(f"{__package__}.{module}")
