"""The experiments of arXiv 2601.03162 and worked differential equations, and the command line that runs them.

A package beside pgdfast, installed with it. It uses the public names of pgdfast alone, as any user would; nothing in
pgdfast imports it but `python -m pgdfast`. `tasks` lists the experiments and says what each of their modules defines.
"""
