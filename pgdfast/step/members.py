"""What an optimizer remembers of each member, and what becomes of it when members part or join."""

from __future__ import annotations

import copy
import math

import torch

from .choice import RULES
from .rules import DampingRule


def new_memory(rule: DampingRule, dampings: list[float] | None) -> dict:
    """The memory of an optimizer before its first step.

    dampings: mu by member; None where mu is given anew at every step, NaN where the first step is to find it.
    """
    return {"step": 0, "members": [_fresh(rule, mu) for mu in dampings]}


def _fresh(rule: DampingRule, mu: float | None) -> dict:
    return {
        "damping": mu, "rule": rule.memory(), "wide": False, "keep": {}, "rejected": 0, "momentum": False,
        "curvature": math.nan, "scaled": None,
    }


def checked(memory: dict, rule: DampingRule, count: int) -> dict:
    """A memory out of a state_dict, if it is one for this rule and this many members.

    Raises ValueError for another number of members and for another rule's memory.
    """
    members = memory.get("members")
    if not isinstance(members, list) or not members or not all(isinstance(m, dict) and "rule" in m for m in members):
        raise ValueError(
            "pgdfast.LM: the loaded state is not one of pgdfast.LM of this version; load one that LM.state_dict() gave."
        )
    if len(members) != count:
        raise ValueError(
            f"pgdfast.LM: the loaded state is that of {len(members)} member(s) and this LM trains {count}; load one of as many."
        )
    wanted, adaptive = set(rule.memory()), rule.tries
    for member in members:
        if set(member["rule"]) != wanted or (member["damping"] is None) == adaptive:
            raise ValueError(
                f"pgdfast.LM: the loaded state was saved under {_saved_under(member)}, and this LM has {type(rule).__name__}; "
                "make the LM with the damping_rule and acceleration that the state was saved with."
            )
    return memory


def _saved_under(member: dict) -> str:
    """The rules that remember what this member does, in words."""
    names = [
        repr(name) for name, rule in RULES.items()
        if set(rule().memory()) == set(member["rule"]) and rule.tries == (member["damping"] is not None)
    ]
    if names == ["'gain-ratio'"]:
        return "damping_rule='gain-ratio' (the former default, with acceleration=None)"
    if names:
        return f"damping_rule={' or '.join(names)}"
    return f"a damping rule that remembers {', '.join(member['rule']) or 'nothing'}"


def share_of(state: dict, b: int) -> dict:
    """Member b's share of an ensemble's state_dict: the state_dict of an LM that trains it alone."""
    shares = {}
    for k, values in state["state"].items():
        shares[k] = {name: _member_of(name, value, b) for name, value in values.items()}
    groups = [group | {"lr": group["lr"] if _is_one(group["lr"]) else float(group["lr"][b])} for group in state["param_groups"]]
    return {"state": shares, "param_groups": groups}


def _member_of(name: str, value, b: int):
    if name == "step":
        return value
    return [copy.copy(value[b])] if name == "members" else value[b].clone()


def joined(states: list[dict]) -> dict:
    """The inverse of `share_of`: one state_dict for an ensemble of these members.

    Raises ValueError for members that have taken different numbers of steps.
    """
    steps = [[values.get("step") for values in state["state"].values()] for state in states]
    if any(taken != steps[0] for taken in steps):
        told = ", ".join(str(max(filter(None, taken), default=0)) for taken in steps)
        raise ValueError(
            f"pgdfast.LM: members that have taken {told} steps cannot go on as one ensemble; join those with equally many."
        )
    memory: dict = {}
    for k in dict.fromkeys(key for state in states for key in state["state"]):
        names = dict.fromkeys(name for state in states for name in state["state"].get(k, {}))
        memory[k] = {name: _of_all(name, [state["state"].get(k, {}).get(name) for state in states]) for name in names}
    groups = []
    for k, group in enumerate(states[0]["param_groups"]):
        rates = [state["param_groups"][k]["lr"] for state in states]
        groups.append(group | {"lr": rates[0] if all(rate == rates[0] for rate in rates) else rates})
    return {"state": memory, "param_groups": groups}


def _of_all(name: str, each: list):
    if name == "step":
        return each[0]
    if name == "members":
        return [copy.copy(member) for members in each for member in members]
    like = next(value for value in each if value is not None)   # a member without momentum yet has no vector
    return torch.stack([torch.zeros_like(like) if value is None else value for value in each])


def _is_one(rate) -> bool:
    """Whether all members have this learning rate."""
    return rate.dim() == 0 if isinstance(rate, torch.Tensor) else not isinstance(rate, (list, tuple))


def each_of(value, count: int, name: str) -> list[float]:
    """B numbers from one number or from B. Raises ValueError for another count, negative ones and what is not finite."""
    values = value.tolist() if isinstance(value, torch.Tensor) else value
    values = list(values) if isinstance(values, (list, tuple)) else [values] * count
    if len(values) != count or not all(isinstance(v, (int, float)) and 0 <= v < math.inf for v in values):
        raise ValueError(
            f"pgdfast.LM: {name} of an ensemble of {count} is {value!r}; it must be a finite number that is not negative, or "
            f"{count} of them."
        )
    return [float(v) for v in values]
