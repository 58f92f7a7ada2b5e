"""Writes adamw.json: AdamW steps by optax in float64.

python3 -m venv venv && venv/bin/pip install optax && venv/bin/python adamw.py > adamw.json
"""

import json

import jax

jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import optax

runs = []
rng = np.random.default_rng(7)
for betas, eps, decay, scale in [((0.9, 0.999), 1e-8, 0.0, 1.0), ((0.9, 0.95), 1e-6, 0.1, 1e-4), ((0.5, 0.9), 1e-3, 0.01, 3.0)]:
    values = rng.normal(size=6).astype(np.float32)
    gradients = (scale * rng.normal(size=(20, 6))).astype(np.float32)
    gradients[5] = 0
    rates = [0.01 * (1 + 0.1 * i) for i in range(20)]
    optimizer = optax.adamw(lambda i: jnp.asarray(rates)[i], b1=betas[0], b2=betas[1], eps=eps, weight_decay=decay)
    p = jnp.asarray(values, jnp.float64)
    state, after = optimizer.init(p), []
    for g in gradients:
        update, state = optimizer.update(jnp.asarray(g, jnp.float64), state, p)
        p = optax.apply_updates(p, update)
        after.append(p.tolist())
    runs.append(dict(betas=betas, eps=eps, weight_decay=decay, rates=rates, values=values.tolist(),
                     gradients=gradients.tolist(), after=after))
print(json.dumps(dict(about="AdamW over 20 steps of 6 values", source=f"optax {optax.__version__} in float64; adamw.py", runs=runs)))
