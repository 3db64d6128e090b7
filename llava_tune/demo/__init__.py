"""The demo: a small data set drawn by seed, and a small LLaVA that can learn it on a laptop."""
