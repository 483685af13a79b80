"""Many processes that run one program: how they meet, what they agree on, and how they end.

Every process runs the same loop on global arrays, as JAX expects. `processes` exchanges what only one process can know;
`distributed` starts jax.distributed and ends a process in our way. This room does not know what is trained, and uses
only `errors`.
"""
