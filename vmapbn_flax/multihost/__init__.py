"""Many processes that run one program: how they meet, what they agree on, and how they end.

Every process runs the same loop on global arrays, as JAX expects. `processes` has the one way in which they tell one
another what only one of them can know; `distributed` is jax.distributed with our ways to end. Nothing here knows what
is trained: it uses only the modules below.
"""
