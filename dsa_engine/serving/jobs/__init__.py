from dsa_engine.serving.jobs.queue import Jobs

__all__ = ["Jobs"]
