"""Worked problems: differential equations solved by networks, each against a reference, by Adam, L-BFGS and LM.

One file per equation holds its network, points and residuals, written as in any script; `worked` is the rest: every optimizer
gets the same seconds, and what comes out is compared, tabulated and drawn. `networks` are what several of them use.
"""
