"""How XLA compiles in tests: most of their time is compiling, little is computing."""

# A third to two fifths less processor time where it was measured (attention, batching), the same results.
QUICKLY = "--xla_backend_optimization_level=0"
