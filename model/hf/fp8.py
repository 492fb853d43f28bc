"""Quantized matrices in fp8: in blocks as of DeepSeek-V3 and Qwen3, with one scale as AutoFP8 and ModelOpt store them.

Sources: integrations/finegrained_fp8.py of transformers; auto_fp8/quantize.py of neuralmagic/AutoFP8;
vllm/model_executor/layers/quantization/modelopt.py.
"""

import functools
from collections.abc import Iterable

from ..fields import Fields
from ..schemes import Scheme
from .compressed import plain_parts
from .stored import Stored, all_layers_but, only


def fp8(settings: Fields) -> Stored:
    """How matrices are stored; activations are not rounded for products with blocks, which is closer."""
    only(settings, "fmt", "e4m3")
    only(settings, "activation_scheme", "dynamic", "static")
    skipped = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    if "weight_block_size" not in settings:
        return _with_one_scale(skipped, settings.get("activation_scheme"))
    rows, columns = settings["weight_block_size"]
    parts = functools.partial(plain_parts, "weight_scale_inv", False)
    return Stored(Scheme("float8_e4m3fn", group=columns, rows=rows), all_layers_but(skipped), parts)


def modelopt(settings: Fields) -> Stored:
    """How matrices are stored by settings of ModelOpt, which its own file keeps under "quantization"."""
    inner = settings | settings.object("quantization").values
    only(inner | {"quant_algo": inner.get("quant_algo", "none")}, "quant_algo", "FP8")
    return _with_one_scale(inner.get("exclude_modules") or inner.get("ignore") or (), "static")


def _with_one_scale(skipped: Iterable[str], activations: str | None) -> Stored:
    parts = functools.partial(plain_parts, "weight_scale", True)
    scheme = Scheme("float8_e4m3fn", dynamic=activations == "dynamic", static=activations == "static")
    return Stored(scheme, all_layers_but(skipped), parts)
