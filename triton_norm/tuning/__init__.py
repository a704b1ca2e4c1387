"""Which regime and block sizes a kernel runs with: heuristic, cost model, measurement and table."""
