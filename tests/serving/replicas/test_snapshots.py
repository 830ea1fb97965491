"""Snapshots of streams, and the store that keeps them."""

from __future__ import annotations

import numpy as np

from dsa_engine.serving.replicas.snapshots import InMemorySnapshotStore, StreamSnapshot
from tests.support.serving.cluster import PROMPTS


def test_a_snapshot_survives_its_bytes(pipes):
    """Into another pipeline: cache, past, prompt, noise, the decoder's state and the policy's own state."""
    ours, other = pipes
    with ours.session(PROMPTS[0], seed=2**63 + 5, step_policy="budget:1000fps") as session:
        for _ in range(4):
            session.next_chunk()
        session.update(PROMPTS[1])
        data = StreamSnapshot(session.snapshot(), session.index, 1, 0.25).pack()
        lag = session.rollout.policies[0].lag
        kept = StreamSnapshot.unpack(data, other.engine.dit.device)
        assert (kept.index, kept.settled, kept.threshold) == (4, 1, 0.25)
        assert kept.snapshot.rollout["policies"][0].lag == lag
        with other.session(PROMPTS[2], seed=1, step_policy="fixed") as restored:
            restored.restore(kept.snapshot)
            restored.rollout.policies[0].threshold = session.rollout.policies[0].threshold = 0.5
            for _ in range(3):
                expected, chunk = session.next_chunk(), restored.next_chunk()
                restored.rollout.policies[0].threshold = session.rollout.policies[0].threshold = 0.5
                assert np.array_equal(chunk.frames, expected.frames) and chunk.pts == expected.pts
                assert chunk.prompt == PROMPTS[1]


def test_a_snapshots_bytes_hold_what_the_next_chunk_is_compared_with(pipes):
    ours, other = pipes
    with ours.session(PROMPTS[0], seed=5, step_policy="relative") as session, other.session(PROMPTS[2]) as restored:
        for _ in range(3):
            session.next_chunk()
        data = StreamSnapshot(session.snapshot(), session.index, 0).pack()
        restored.restore(StreamSnapshot.unpack(data, other.engine.dit.device).snapshot)
        assert restored.rollout.exit_confidence.equal(session.rollout.exit_confidence)
        assert [restored.next_chunk().steps for _ in range(5)] == [session.next_chunk().steps for _ in range(5)]


def test_snapshots_belong_to_the_run_that_claimed_them_last():
    now = [0.0]
    snapshots = InMemorySnapshotStore(lifetime=10.0, clock=lambda: now[0])
    assert snapshots.claim("s", "one", 0) is None
    assert snapshots.put("s", "one", 4, b"four")
    assert snapshots.claim("s", "two", 5) == b"four"
    assert not snapshots.put("s", "one", 6, b"six")
    snapshots.remove("s", "one")
    assert snapshots.claim("s", "three", 4) == b"four"
    assert snapshots.claim("s", "four", 3) is None  # of a later chunk than is wanted: another stream of that name
    snapshots.remove("s", "four")
    assert snapshots.sizes() == {}
    snapshots.put("old", "one", 1, b"1")
    now[0] = 11.0
    snapshots.put("new", "one", 1, b"1")
    assert snapshots.sizes() == {"new": 1}
