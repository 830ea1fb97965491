"""The engine in an asyncio server of your own: live video over plain TCP, line by line.

    python -m dsa_engine.serving.examples.asyncio_server 7000

A client's first line is its request, {"prompt": "a red circle rests", "num_frames": 48}; each later line is another
prompt. Every chunk is a line {"index", "steps", "shape"} followed by the bytes of its frames; the last line says why
the stream ended.
"""

from __future__ import annotations

import asyncio
import json
import sys

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving import (
    ChunkReady,
    Closed,
    LocalBackend,
    LocalStream,
    Overloaded,
    StreamRequest,
    UpdateRejected,
    Worker,
    WorkerLimits,
)


async def serve_client(backend: LocalBackend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    def send(message: dict) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    try:
        stream = await backend.open(StreamRequest(**json.loads(await reader.readline())))
        listening = asyncio.create_task(listen(stream, reader))
        async for event in stream:  # requesting the next event lets the next chunk start
            if isinstance(event, ChunkReady):
                chunk = event.chunk
                send({"index": chunk.index, "steps": chunk.steps, "shape": chunk.frames.shape})
                writer.write(chunk.frames.tobytes())
            elif isinstance(event, (UpdateRejected, Closed)):
                send(vars(event))
            await writer.drain()  # a slow client slows only its own stream
        listening.cancel()
    except (ValueError, TypeError, Overloaded) as error:
        send({"error": str(error)})
    except ConnectionError:
        pass  # `listen` closes the stream
    finally:
        writer.close()


async def listen(stream: LocalStream, reader: asyncio.StreamReader) -> None:
    try:
        async for line in reader:
            await stream.update(line.decode(errors="replace").strip())
    finally:  # the client is gone, or has received everything
        await stream.close()


async def main(model: str, port: int) -> None:
    pipe = Pipeline.from_pretrained(model, max_sessions=8)
    backend = LocalBackend(Worker(pipe, WorkerLimits(max_sessions=8, max_jobs=0)))
    backend.start()
    server = await asyncio.start_server(lambda *ends: serve_client(backend, *ends), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main("shapes", int(sys.argv[1])))
