"""The flow, its solvers, guidance."""
