"""The engine in a loop of one's own: no thread, no asyncio, no server. Streams share their forwards, a step at a time.

python -m dsa_engine.serving.examples.custom_worker "a red circle rests" "a blue square jumps"
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable

from dsa_engine.engine.batch_runner import Runner
from dsa_engine.engine.session import Chunk, Session
from dsa_engine.pipeline import Pipeline

END = (None, None)


def work(pipe: Pipeline, requests: queue.Queue, give: Callable[[str, Chunk | ValueError], object]) -> None:
    """Make what `requests` ask for until END has come and all is made.

    A request is (name, prompt): a new name begins a stream of the model's own length, one that runs goes on under the
    prompt from its next chunk on. give(name, chunk) is called for each chunk, give(name, error) for what cannot be.
    """
    runner, more = Runner(capacity=8), True
    sessions: dict[str, Session] = {}
    told: dict[str, str] = {}
    while more or sessions:
        while more and not (sessions and requests.empty()):  # with nothing to make: wait
            name, prompt = requests.get()
            more = name is not None
            if name in sessions:
                told[name] = prompt
            elif more:
                try:
                    sessions[name] = pipe.session(prompt, num_frames=pipe.frames)
                    runner.add(sessions[name])
                except ValueError as error:
                    give(name, error)
        for session in runner.forward():  # one forward for all; these have their chunk
            name = next(name for name, other in sessions.items() if other is session)
            give(name, session.finish())
            if session.exhausted:
                sessions.pop(name).close()
                continue
            try:
                if name in told:
                    session.update(told.pop(name))
            except ValueError as error:
                give(name, error)
            runner.add(session)


if __name__ == "__main__":
    wanted: queue.Queue = queue.Queue()
    for request in [*enumerate(sys.argv[1:]), END]:
        wanted.put(request)
    with Pipeline.from_pretrained("shapes") as model:
        work(model, wanted, lambda name, made: sys.stdout.write(f"stream {name}: {getattr(made, 'index', made)}\n"))
