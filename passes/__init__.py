"""The catalogue: one ordered tuple that is registry, flag names and default pipeline."""

from __future__ import annotations

from typing import Any

from fxopt.passes.decode_attention import DecodeAttention
from fxopt.passes.fuse_gate_up import FuseGateUp
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.grouped_attention import GroupedAttention
from fxopt.passes.last_logits import LastLogits
from fxopt.passes.linear_library import LinearLibrary
from fxopt.passes.matvec import Matvec
from fxopt.passes.offload_kv import OffloadKV
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.passes.plan_memory import PlanMemory
from fxopt.passes.quantize_kv import QuantizeKV
from fxopt.passes.quantize_weights import QuantizeWeights
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.passes.rotary import Rotary
from fxopt.passes.static_kv import StaticKV
from fxopt.passes.window_kv import WindowKV
from fxopt.rewrite import Pass

PASSES: tuple[type[Pass[Any]], ...] = (
    RemoveControlFlow,
    StaticKV,
    GroupedAttention,
    WindowKV,
    FuseQKV,
    FuseGateUp,
    Rotary,
    LastLogits,
    QuantizeKV,
    QuantizeWeights,
    DecodeAttention,
    Matvec,
    LinearLibrary,
    PlanMemory,
    OffloadWeights,
    OffloadKV,
)

#: What is applied where nobody asks for more or less.
DEFAULT_PASSES = tuple(kind for kind in PASSES if kind.by_default)
