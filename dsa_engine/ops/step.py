from dsa_engine.structures import REDUCE, Epilogue, HeadWeights, Projection, StopRule  # noqa: F401
