"""Weights that are streamed: which layers, from where, through how many slots, and what it costs. Without torch."""

from __future__ import annotations

from fxopt.offload.errors import StoreError
from fxopt.offload.placement import Placement, place
from fxopt.offload.prediction import Prediction, Rates, predict

__all__ = ["Placement", "Prediction", "Rates", "StoreError", "place", "predict"]
