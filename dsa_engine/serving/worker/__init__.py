from dsa_engine.serving.worker.worker import Worker

__all__ = ["Worker"]
