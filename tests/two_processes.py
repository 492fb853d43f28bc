"""One of the processes of test_distributed.py: generates on a mesh that may span processes, and prints the tokens."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ridgeline as rl

PROMPTS = [list(range(1, 24)), [5], [7, 11, 300, 2], list(range(200, 212))]


def main(directory: str, sizes: str, processes: int, process: int, port: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    if processes > 1:
        rl.initialize_distributed(coordinator_address=f"127.0.0.1:{port}", num_processes=processes, process_id=process)
    assert jax.device_count() == 8
    model = rl.load_model(directory, mesh=rl.make_mesh(**json.loads(sizes)))
    params = [rl.SamplingParams(temperature=0.0, max_tokens=8), rl.SamplingParams(seed=2, max_tokens=8, top_p=0.9)] * 2
    tokens = [output.tokens for output in rl.generate(model, PROMPTS, params)]
    read = sum(shard.data.nbytes for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
    logits = rl.forward(model.params, model.config, jnp.asarray([PROMPTS[0]] * 4))
    local = float(np.abs(np.asarray(logits.addressable_shards[0].data)).sum())
    print("RESULT", json.dumps({"tokens": tokens, "bytes": read, "finite": local == local}))


if __name__ == "__main__":
    directory, sizes, *numbers = sys.argv[1:]
    main(directory, sizes, *map(int, numbers))
