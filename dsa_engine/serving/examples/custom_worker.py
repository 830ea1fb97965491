"""The engine in a loop of your own: no thread, no asyncio, no server. Streams share forwards, step by step.

python -m dsa_engine.serving.examples.custom_worker "a red circle rests" "a blue square jumps"
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable

from dsa_engine.engine.batch_runner import Runner
from dsa_engine.engine.chunk import Chunk
from dsa_engine.engine.session import Session
from dsa_engine.pipeline import Pipeline

END = (None, None)


def work(pipe: Pipeline, requests: queue.Queue, deliver: Callable[[str, Chunk | ValueError], object]) -> None:
    """Generate what `requests` ask for until END was received and all streams are complete.

    Args:
        pipe: with a slot for each stream.
        requests: (name, prompt): a new name starts a stream of the model's default length; a running one gets the
            prompt from its next chunk on.
        deliver: called as (name, chunk) for each chunk, as (name, error) for a request that is not possible.
    """
    runner, receiving = Runner(capacity=8), True
    sessions: dict[str, Session] = {}
    prompts: dict[str, str] = {}
    while receiving or sessions:
        while receiving and not (sessions and requests.empty()):  # without sessions: wait
            name, prompt = requests.get()
            receiving = name is not None
            if name in sessions:
                prompts[name] = prompt
            elif receiving:
                try:
                    sessions[name] = pipe.session(prompt, num_frames=pipe.frames)
                    runner.add(sessions[name])
                except ValueError as error:
                    deliver(name, error)
        for session in runner.forward():  # one forward for all streams; these have completed a chunk
            name = next(name for name, other in sessions.items() if other is session)
            deliver(name, session.finish())
            if session.exhausted:
                sessions.pop(name).close()
                continue
            try:
                if name in prompts:
                    session.update(prompts.pop(name))
            except ValueError as error:
                deliver(name, error)
            runner.add(session)


if __name__ == "__main__":
    pending: queue.Queue = queue.Queue()
    for request in [*enumerate(sys.argv[1:]), END]:
        pending.put(request)
    with Pipeline.from_pretrained("shapes") as model:
        work(model, pending, lambda name, made: sys.stdout.write(f"stream {name}: {getattr(made, 'index', made)}\n"))
