"""How many visual tokens does a data set need: benchmarks at every scale, and what their outcomes say."""
