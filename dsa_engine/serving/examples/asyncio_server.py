"""The engine in an asyncio server of one's own: live video over plain TCP, line by line.

    python -m dsa_engine.serving.examples.asyncio_server 7000

A client's first line is its order, {"prompt": "a red circle rests", "num_frames": 48}; each line after it is another
prompt. Every chunk comes as a line {"index", "steps", "shape"} and then the bytes of its frames; the last line says why
no more come.
"""

from __future__ import annotations

import asyncio
import json
import sys

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import ChunkReady, Closed, Overloaded, StreamRequest, UpdateRejected
from dsa_engine.serving.worker.in_process import LocalBackend, LocalStream
from dsa_engine.serving.worker.worker import Worker


async def talk(backend: LocalBackend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    def say(facts: dict) -> None:
        writer.write(json.dumps(facts).encode() + b"\n")

    try:
        stream = await backend.open(StreamRequest(**json.loads(await reader.readline())))
        listening = asyncio.create_task(listen(stream, reader))
        async for event in stream:  # asking for the next event lets the next chunk begin
            if isinstance(event, ChunkReady):
                chunk = event.chunk
                say({"index": chunk.index, "steps": chunk.steps, "shape": chunk.frames.shape})
                writer.write(chunk.frames.tobytes())
            elif isinstance(event, (UpdateRejected, Closed)):
                say(vars(event))
            await writer.drain()  # a slow client slows its own stream and nobody else's
        listening.cancel()
    except (ValueError, TypeError, Overloaded) as error:
        say({"error": str(error)})
    except ConnectionError:
        pass  # `listen` sees it too
    finally:
        writer.close()


async def listen(stream: LocalStream, reader: asyncio.StreamReader) -> None:
    try:
        async for line in reader:
            await stream.update(line.decode(errors="replace").strip())
    finally:  # the client is gone, or has had it all
        await stream.close()


async def main(model: str, port: int) -> None:
    backend = LocalBackend(
        Worker(Pipeline.from_pretrained(model, max_sessions=8), WorkerLimits(max_sessions=8, max_jobs=0))
    )
    backend.start()
    server = await asyncio.start_server(lambda *ends: talk(backend, *ends), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main("shapes", int(sys.argv[1])))
