"""A memory plan: from a config alone, as a table and a picture; then the same graph run in one arena.

python examples/plan_memory.py                     # a tiny random Llama, in seconds
python examples/plan_memory.py --svg /tmp/plan.svg
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxopt.activation_plan import plan_activations
from fxopt.admission import select
from fxopt.arena import ArenaModule
from fxopt.families import tiny
from fxopt.pipeline import Pipeline, Policy
from fxopt.planning import plan_model
from fxopt.program import ATTENTION_MASK, LOGIT_POSITIONS, Program
from fxopt.request import Request
from fxopt.shadow import shadow_replay
from fxopt.shape_sets import ShapeSet, examples
from fxopt.specialise import Role
from fxopt.weights import pack

MAX_LEN = 128
SETS: list[ShapeSet] = [{"step": 32, "window": 64}, {"step": 64, "window": 128}]


def prefill_graph(model: PreTrainedModel) -> Program:
    """The graph that reads a prompt, after all passes, with the model's weights."""
    captured = Request(MAX_LEN, backend="eager").captured(model)
    pipeline = Pipeline(select("default"), captured, Policy())
    pipeline.run()
    pipeline.program = pack(pipeline.program)
    return pipeline.specialised(Role("prefill", batch=1, longest_step=64))


def inputs_for(program: Program, shapes: ShapeSet) -> list[Tensor]:
    """Tokens 0, 1, 2 … at the rows 0, 1, 2 … of an empty cache; the logits of the first are asked for."""
    made = []
    for name, layout in zip(program.placeholders(), examples(program, shapes), strict=True):
        if name in (ATTENTION_MASK, LOGIT_POSITIONS):
            made.append(torch.full(layout.sizes, int(name == ATTENTION_MASK)))
        elif layout.dtype == torch.int64:
            made.append(torch.arange(layout.sizes[-1]).expand(layout.sizes).contiguous())
        else:
            made.append(torch.zeros(layout.sizes, dtype=layout.dtype))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", metavar="FILE", help="draw the plan")
    options = parser.parse_args()
    model = tiny("llama")

    # How much will it need? No weights are looked at for this.
    planned = plan_model(model.config, MAX_LEN, shapes={"prefill": SETS, "decode": []})
    print(planned)
    if options.svg:
        print("drawn:", *planned.draw(options.svg))

    # The same, with weights: every result goes to its place in one arena.
    program = prefill_graph(model)
    module = ArenaModule(program.gm, plan_activations(program, SETS))
    assert module.arena.nbytes == planned["prefill"].arena
    print(f"\nan arena of {module.arena.nbytes:,} bytes")
    for shapes in SETS:
        stock, fast = (graph(*inputs_for(program, shapes))[0] for graph in (program.gm, module))
        torch.testing.assert_close(fast, stock)
        replay = shadow_replay(module, inputs_for(program, shapes))
        print(f"{dict(shapes)}: {replay.compared} operators compared, {len(replay.differences)} differ")
    print({name: count for name, count in module.stats.items() if "own memory" in name})


if __name__ == "__main__":
    main()
