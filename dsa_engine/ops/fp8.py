from dsa_engine.structures import CacheScales, Rowwise  # noqa: F401
