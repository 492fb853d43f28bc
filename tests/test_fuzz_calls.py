"""Public calls with an argument that is wrong, or odd: each gives what is finite, or an error that names the argument.

`--mutations 2000 --mutation-seed 1 -s` tries more, and prints a table of the outcomes.
"""

import asyncio
import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

import ridgeline as rl
from fuzzing import ODD_VALUES, Outcomes
from ridgeline import programs, roofline
from ridgeline.model.schemes import SCHEMES
from tiny import byte_tokenizer, tiny_config, tiny_model

PROMPTS = [[1, 2, 3], "ab"]
SIZES = {"max_batch_size": 2, "kv_dtype": None}
ENGINE = {"max_batch_size": 2, "max_length": 64, "prefill_tokens": 64, "cache_tokens": 256, "whole_batches": True}
MESSAGES = [{"role": "user", "content": "hi"}]
SAMPLING = {"max_tokens": 2, "temperature": 0.5, "top_k": 3, "seed": 1, "stop": ["x"], "logprobs": 1, "logit_bias": {}}
ODD = (
    *ODD_VALUES,
    *(np.float32(2), np.int64(3), np.array(3), np.zeros((0,), np.int32), np.zeros((2, 2)), np.full((1, 3), -1), "ab"),
    *(jnp.ones((1, 2, 3)), jnp.array([[600, 1]]), np.array([[1, 2]], np.uint8), np.array([True]), b"ab", object()),
    *({1, 2}, range(3), (n for n in (1, 2)), lambda: None, jax.ShapeDtypeStruct((1, 2), jnp.int32), np.str_("a")),
)
"""What no argument, or few, expect."""

Call = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]
"""A function, and what makes arguments with which it succeeds."""


def small_model() -> rl.Model:
    rope = rl.RopeConfig(rotary_dim=8)
    config = tiny_config(
        vocab_size=256, embed_dim=16, ffn_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64,
        layers=(rl.LayerConfig(rope, window=9), rl.LayerConfig(rope)),
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    tokenizer.chat_templates["default"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return dataclasses.replace(tiny_model(config), tokenizer=tokenizer)


def through_engine(prompt: Any, sampling: Any, priority: Any, **options: Any) -> list[rl.RequestOutput]:
    with rl.Engine(**options) as engine:
        engine.submit(prompt, sampling, priority=priority)
        return [chunk.output for chunk in engine.run() if chunk.output]


def through_async_engine(prompt: Any, sampling: Any, priority: Any, **options: Any) -> list[rl.RequestOutput]:
    async def serve() -> list[rl.RequestOutput]:
        async with rl.AsyncEngine(**options) as engine:
            return [c.output async for c in engine.stream(prompt, sampling, priority=priority) if c.output]

    return asyncio.run(serve())


def public_calls(model: rl.Model, directory: Any) -> dict[str, Call]:
    config, params, bundled = model.config, model.params, rl.load_model("bundled")
    weight, scheme = params["layers"][0]["down"], SCHEMES["int8"]
    quantized, view = rl.quantize(weight, scheme), rl.hf_view(params, config)
    greedy = rl.SamplingParams(max_tokens=2, temperature=0.0)
    tokens, lengths = np.array([[1, 2, 3], [4, 5, 6]]), np.array([3, 2])
    hidden = jnp.ones((1, 2, 16))
    heads = {"q": jnp.ones((1, 2, 1, 2, 8)), "k": jnp.ones((1, 2, 1, 8))}
    _, plan = rl.make_sampling_state([greedy], None, [0], 256)

    def cache() -> rl.KVCache:
        return rl.init_cache(config, 2, 32)

    def state() -> Any:
        return rl.make_sampling_state([greedy] * 2, None, [0, 0], 256)[0]

    network = {"params": params, "config": config}
    asked = {"model": model, "prompts": PROMPTS, "sampling": greedy, **SIZES, "adjust": None, "residual": None}
    served = {"model": model, "prompt": [1, 2], "sampling": greedy, "priority": 0, **ENGINE}
    of_config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    of_rope = {field.name: getattr(config.layers[0].rope, field.name) for field in dataclasses.fields(rl.RopeConfig)}
    return {
        "generate": (rl.generate, lambda: {**asked, "callback": None}),
        "stream": (lambda **given: [c.output for c in rl.stream(**given) if c.output], lambda: asked),
        "generate a chat": (rl.generate, lambda: {**asked, "prompts": MESSAGES, "sampling": None}),
        "beam_search": (
            rl.beam_search,
            lambda: {"model": model, "prompts": [[1, 2]], "beam_width": 2, "max_tokens": 2, "length_penalty": 1.0},
        ),
        "Engine": (through_engine, lambda: served),
        "AsyncEngine": (through_async_engine, lambda: served),
        "SamplingParams": (rl.SamplingParams, lambda: SAMPLING),
        "score": (
            rl.score,
            lambda: {"model": model, "prompts": PROMPTS, "continuations": [[4], "cd"], "top": 1, **SIZES},
        ),
        "evaluate": (
            rl.evaluate,
            lambda: {"model": model, "texts": ["abc", [1, 2]], "context": 8, "stride": 4, "batch_size": 2, "limit": 4},
        ),
        "forward": (rl.forward, lambda: {**network, "tokens": tokens, "residual": None, "component": None}),
        "prefill": (rl.prefill, lambda: {**network, "tokens": tokens, "lengths": lengths, "cache": cache()}),
        "decode_step": (rl.decode_step, lambda: {**network, "tokens": lengths, "cache": cache()}),
        "decode_steps": (
            rl.decode_steps,
            lambda: {**network, "tokens": lengths, "cache": cache(), "state": state(), "plan": plan, "steps": 2},
        ),
        "extend": (rl.extend, lambda: {**network, "tokens": tokens, "new": lengths, "cache": cache()}),
        "transformer": (rl.transformer, lambda: {**network, "tokens": tokens}),
        "unembed": (rl.unembed, lambda: {**network, "x": hidden}),
        "final_norm": (rl.final_norm, lambda: {**network, "x": hidden}),
        "attention_weights": (rl.attention_weights, lambda: {**heads, "options": rl.AttentionSpec(1.0)}),
        "init_cache": (
            rl.init_cache,
            lambda: {"config": config, "batch_size": 2, "max_length": 32, "page_size": 16, "kv_dtype": None},
        ),
        "fork": (rl.fork, lambda: {"cache": cache(), "rows": [0, 0, 1]}),
        "KVCache.read": (lambda layer: cache().read(layer), lambda: {"layer": 0}),
        "sample": (
            rl.sample,
            lambda: {"logits": jnp.ones((2, 256)), "state": state(), "positions": lengths, "plan": plan},
        ),
        "make_sampling_state": (
            rl.make_sampling_state,
            lambda: {"params": [greedy], "prompts": [[1]], "seeds": [1], "vocab_size": 256, "batch_size": 2},
        ),
        "load_model": (rl.load_model, lambda: {"path": "bundled", "dtype": None, "quantize": None, "mesh": None}),
        "save_model": (
            lambda **given: rl.save_model(**given).name,
            lambda: {"model": bundled, "directory": directory / str(len([*directory.iterdir()])), "dtype": "float32"},
        ),
        "hf_view": (rl.hf_view, lambda: network),
        "from_hf_view": (rl.from_hf_view, lambda: {"view": view, "config": config, "mesh": None}),
        "quantize": (rl.quantize, lambda: {"w": weight, "scheme": scheme, "in_axes": 1}),
        "dequantize": (rl.dequantize, lambda: {"w": quantized, "dtype": "float32"}),
        "init_params": (rl.init_params, lambda: {"config": config, "key": jax.random.key(0), "mesh": None}),
        "param_specs": (lambda **given: len(rl.param_specs(**given)), lambda: {"config": config, "tensor": 1}),
        "count_parameters": (rl.count_parameters, lambda: {"config": config}),
        "preset": (rl.preset, lambda: {"name": "llama-3.1-8b"}),
        "make_mesh": (rl.make_mesh, lambda: {"data": 1, "expert": 1, "tensor": 1, "devices": None}),
        "ModelConfig": (rl.ModelConfig, lambda: of_config),
        "RopeConfig": (rl.RopeConfig, lambda: of_rope),
        "LayerConfig": (rl.LayerConfig, lambda: {"rope": config.layers[0].rope, "window": 3}),
        "Tokenizer.encode": (model.tokenizer.encode, lambda: {"text": "ab", "add_special_tokens": True}),
        "Tokenizer.decode": (model.tokenizer.decode, lambda: {"ids": [1, 2], "skip_special_tokens": True}),
        "Tokenizer.apply_chat_template": (
            model.tokenizer.apply_chat_template,
            lambda: {"conversation": MESSAGES, "tools": None, "chat_template": None, "tokenize": True},
        ),
    }


def calls_without_arrays(config: rl.ModelConfig) -> dict[str, Call]:
    deployment, card = roofline.Deployment(config), roofline.find_hardware("h100")
    counts = roofline.count_decode(deployment, batch=2, context=3)
    return {
        "programs.lower_decode": (
            lambda **given: repr(programs.lower_decode(**given)),
            lambda: {"config": config, "mesh": rl.make_mesh(), "batch_size": 2, "max_length": 32, "kv_dtype": None},
        ),
        "roofline.Deployment": (
            roofline.Deployment,
            lambda: {"config": config, "weights": "int8", "kv": None, "tensor": 1, "page_size": 16},
        ),
        "roofline.predict": (
            roofline.predict,
            lambda: {"steps": counts, "hardware": card, "dtype": "float32", "tensor": 1},
        ),
        "roofline.count_step": (
            roofline.count_step,
            lambda: {"deployment": deployment, "batch": 2, "tokens": 3, "cached": 4, "scored": 1},
        ),
        "roofline.predict_generation": (
            roofline.predict_generation,
            lambda: {"deployment": deployment, "hardware": card, "batch": 2, "prompt": 4, "new_tokens": 3, "chunk": 2},
        ),
        "roofline.predict_speculation": (
            roofline.predict_speculation,
            lambda: {
                **{"target": deployment, "draft": deployment, "hardware": card, "batch": 1, "context": 8},
                **{"acceptance": 0.5, "draft_tokens": 3, "efficiency": 0.9},
            },
        ),
        "roofline.plan": (
            roofline.plan,
            lambda: {
                **{"config": config, "hardware": card, "tensors": [1], "batches": [1, 2], "context": 32, "prompt": 8},
                **{"chunk": None, "weights": None, "kv": "int8", "memory_fraction": 0.5, "efficiency": 1, "price": 2},
            },
        ),
    }


_ALIASES = {"name": "preset", "conversation": "messages", "quantize": "scheme", "sampling": "SamplingParams"}
_ALIASES |= {"max_length": "the engine takes", "path": "directory"}


def is_named(argument: str, text: str) -> bool:
    """Whether an error is of an argument, or of one of the things that it holds."""
    return any(name in text for name in (argument, argument.removesuffix("s"), _ALIASES.get(argument, argument)))


def finished(result: Any) -> str:
    """How a call went; ArithmeticError for a result that holds what is no number."""
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, rl.RequestOutput) and leaf.error is not None:
            raise leaf.error
        is_float = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, np.floating)
        if is_float and not bool(jnp.isfinite(leaf).all()):
            raise ArithmeticError("a result that is not finite")
    return "done"


def test_odd_arguments(request, tmp_path, monkeypatch):
    """Without the check of annotations, which the tests have and users do not."""
    monkeypatch.chdir(tmp_path)  # where odd names of directories are made
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        outcomes = Outcomes(TypeError, ValueError, FloatingPointError)
        model = small_model()
        calls = public_calls(model, tmp_path) | calls_without_arrays(model.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for call, make in calls.values():
                finished(call(**make()))
            for number in range(request.config.getoption("mutations")):
                rng = random.Random(f"{request.config.getoption('mutation_seed')}-{number}")
                name = rng.choice([*calls])
                call, make = calls[name]
                given = make()
                argument, odd = rng.choice([*given]), rng.choice(ODD)
                if rng.random() < 0.1:
                    argument, odd = "argument", 1  # which none has
                what, given = f"mutation {number}, {name}({argument}={odd!r:.60})", given | {argument: odd}
                outcomes.of(name, what, lambda: finished(call(**given)), lambda text: is_named(argument, text))  # noqa: B023
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    print(f"\n{outcomes.table()}")
    assert not outcomes.failures, "\n".join(outcomes.failures)
