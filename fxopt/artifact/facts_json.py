"""The facts of a model as plain data, and what of them must agree with the options."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from transformers.utils import ModelOutput

from fxopt.artifact.keys import class_name
from fxopt.artifact.plain import expect, from_plain, to_plain, wrong
from fxopt.program import Facts, whole_windows


def facts_data(facts: Facts) -> dict[str, Any]:
    """The facts, with the class of outputs by name; the device is that of the model that is given."""
    plain = {one.name: getattr(facts, one.name) for one in fields(facts) if one.name not in ("output_class", "device")}
    return {**to_plain(plain), "output_class": class_name(facts.output_class)}


def read_facts(data: Any, options: dict[str, Any], device: torch.device) -> Facts:
    """The facts on this device, if they are what the options say."""
    where = "manifest.json: facts"
    table, hints = expect(dict, data, where), get_type_hints(Facts)
    names = {one.name for one in fields(Facts)} - {"device", "output_class"}
    values = {name: from_plain(hints[name], table.get(name), f"{where}.{name}") for name in names}
    output_class = _output_class(table.get("output_class"), f"{where}.output_class")
    facts = Facts(**values, device=device, output_class=output_class)
    asked = (options["max_len"], whole_windows(options["max_len"]), options["backend"], options["compile"])
    if (facts.max_len, facts.capacity, facts.backend, facts.compile) != asked:
        wrong(where, "what the options say", asked)
    return facts


def _output_class(data: Any, where: str) -> type:
    """A class of model outputs that is loaded already; nothing is imported because a file names it."""
    module, _, name = expect(str, data, where).rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if isinstance(found, type) and issubclass(found, ModelOutput):
        return found
    return wrong(where, "a class of outputs of this model", data)  # type: ignore[no-any-return]
