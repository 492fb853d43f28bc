"""The roof over every number: what hardware can do, what a model has to do, and the time that follows.

deployment = Deployment(preset("llama-3.1-8b"), weights="int8", tensor=2)
step = predict_decode(deployment, find_hardware("h100"), batch=8, context=8192)
print(step.seconds, step.bound, step.intensity, step.ridge)
"""

from .counts import Counts, Part, count_decode, count_prefill, count_step
from .deployment import KV_FORMATS, WEIGHT_FORMATS, Deployment
from .hardware import HARDWARE, Hardware, find_hardware
from .measure import measure
from .plan import PlanRow, plan, remedies
from .plot import plot_plan, plot_roofline
from .predict import (
    Generation,
    Phase,
    cost_per_million,
    predict,
    predict_decode,
    predict_generation,
    predict_prefill,
)
from .speculation import Speculation, best_speculation, expected_tokens, predict_speculation

__all__ = [
    "HARDWARE",
    "KV_FORMATS",
    "WEIGHT_FORMATS",
    "Counts",
    "Deployment",
    "Generation",
    "Hardware",
    "Part",
    "Phase",
    "PlanRow",
    "Speculation",
    "best_speculation",
    "cost_per_million",
    "count_decode",
    "count_prefill",
    "count_step",
    "expected_tokens",
    "find_hardware",
    "measure",
    "plan",
    "plot_plan",
    "plot_roofline",
    "predict",
    "predict_decode",
    "predict_generation",
    "predict_prefill",
    "predict_speculation",
    "remedies",
]
