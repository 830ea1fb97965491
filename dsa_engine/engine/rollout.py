"""A rollout: B clips that advance chunk by chunk in step on the KV cache. Latents only; `Session` adds pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_engine.config import RolloutConfig
from dsa_engine.engine.chunk_plan import Forward, chunk_plan, run_plan
from dsa_engine.engine.device import Moment, on_device
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.interfaces import TextKV
from dsa_engine.sampling.denoise import Denoised, Step, commit_chunk, denoise_chunk, read_policy_signals
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.sampling.noise import Noise
from dsa_engine.sampling.policy import ExitRule, Policy
from dsa_engine.sampling.schedule import Schedule


class Rollout:
    """Owns everything a clip's latents depend on: cache slots, prompt keys and values, noise, policies, position.

    A chunk is committed (its clean keys and values written) only when the next one is wanted: the first frames leave
    earlier, and the last chunk of a clip is never committed at all. State changes only after the forward that it
    belongs to has succeeded, and a forward writes only frames that are evicted anyway, so a failed step can be tried
    again with the same result.
    """

    def __init__(
        self,
        dit: CausalDiT,
        head: ConfidenceHead | None,
        cache: KVCache,
        config: RolloutConfig,
        noise: Noise,
        policies: Sequence[Policy],
        text_kv: TextKV,
        given: Tensor | None = None,
        strength: float = 1.0,
        inputs: ModelRunner | None = None,
    ):
        """given: clean latents [B, G, C, H, W] that the clip begins with; strength: of the Schedule; inputs: the step
        inputs of the cache's slots, with which the commit rides along with a chunk's first step. None: the plain loop.
        """
        self.dit, self.head, self.cache, self.config, self.noise = dit, head, cache, config, noise
        self.schedule = Schedule(config.steps, config.shift, strength)
        self.given = given
        self.initial_policies = [policy.start(len(self.schedule)) for policy in policies]  # what `restart` goes back to
        self.policies = copy.deepcopy(self.initial_policies)
        self.slot: Tensor | None = cache.acquire(len(policies))
        self.slots: list[int] = self.slot.tolist()
        self.text_kv, self.inputs = text_kv, inputs
        # The last chunk's commit from beginning to end, where it was a forward of its own.
        self.commit_span: tuple[Moment, Moment] | None = None
        self._begin()

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def _begin(self) -> None:
        self.loaded_text_kv: TextKV | None = None  # the prompt that the inputs hold
        self.index = 0  # of the next chunk to be made
        self.position = 0  # of its first frame
        self.past: list[tuple[int, Tensor]] = []  # (first frame, latents) of the chunks that a recache would replay
        if self.given is not None:
            size = self.config.chunk_frames
            short = self.given.shape[1] % size  # a picture is one frame: what is no whole chunk comes first
            for latents in self.given.split([short] * bool(short) + [size] * (self.given.shape[1] // size), dim=1):
                self._remember(latents)
        self.committed = True
        self.recache_queue: list[
            tuple[int, Tensor]
        ] = []  # of the past, that the chunk's forwards have yet to commit anew
        self.commit_in_flight = False  # the chunk before was committed by a forward of a chunk that is not accepted yet
        self.needs_recache = bool(self.past)  # the cache has yet to be made, or was made under an earlier prompt

    @on_device
    @torch.inference_mode()
    def denoise(self, on_step: Callable[[Step], None] | None = None) -> Denoised:
        """Commit the previous chunk and denoise the next one. It counts only when it is taken with `accept`.

        on_step sees every step of the plain loop (`denoise_chunk`); without it the same is done on `inputs`.
        """
        if on_step is None and self.inputs is not None:
            plan, graphs = self.prepare_chunk(), self.inputs.graphs
            if graphs is None:
                forwards = run_plan(plan, self.slots, self.inputs.forward, self.poll_stop_flags)
            else:  # without `stopped` the device's flags decide, which is what lets it loop by itself
                forwards = graphs.run(plan, self.slots, self.poll_stop_flags if self.host_decides else None)
            for node, live in forwards:
                self.on_forward_done(node, live)
            return self.result()
        self._flush_timed()
        return denoise_chunk(
            self.dit,
            self.head,
            self.noise.initial(self.index),
            chunk=self.index,
            sigmas=self.schedule.sigmas,
            policies=self.policies,
            renoise=lambda step, rows: self.noise.renoise(self.index, step, rows),
            text_kv=self.text_kv,
            rows=self.cache.rows(self.slot, self.config.chunk_frames),
            on_step=on_step,
        )

    def _flush_timed(self) -> None:
        start = Moment(self.device)
        self.flush_cache()
        self.commit_span = start, Moment(self.device)

    @on_device
    @torch.inference_mode()
    def prepare_chunk(self) -> tuple[Forward, ...]:
        """Make the inputs ready for the next chunk; returns the plan that makes it. `on_forward_done` follows each forward."""
        inputs, size = self.inputs, self.config.chunk_frames
        self._step_back()
        # A sink that moves lies elsewhere for the chunk before, and a ring needs room for what that one still sees.
        room = self.config.window is None or self.cache.headroom >= size
        merge = room and self.cache.unrotated_sink is None and self.config.commit == "clean"
        whole = all(latents.shape[1] == size for _, latents in self.past)  # a picture at the start is less than a chunk
        commit, self.recache_queue, self.commit_span = merge and not self.committed and not self.needs_recache, [], None
        if commit:
            inputs.x0[self.slot] = self.past[-1][1]
        elif self.needs_recache and merge and whole:
            self.cache.clear(self.slot)
            commit, self.recache_queue = True, list(self.past)
            self._replay()
        else:
            self._flush_timed()
        if self.text_kv is not self.loaded_text_kv:
            inputs.set_prompt(self.slot, self.text_kv)
            self.loaded_text_kv = self.text_kv
        limit = len(self.schedule)
        told = [policy.rule(self.index, limit) for policy in self.policies]
        self.host_decides = None in told  # a policy decides that the device cannot ask
        rules = [rule or ExitRule(1, limit) for rule in told]
        most = max(rule.max_steps for rule in rules)
        inputs.start_chunk(self.slot, self.noise.draw_chunk(self.index, most), self.schedule.sigmas, rules)
        self.counts, self.previous_x0 = dict.fromkeys(self.slots, 0), None
        return chunk_plan(min(rule.min_steps for rule in rules), most, commit, replays=len(self.recache_queue))

    def _replay(self) -> None:
        """The next chunk that is to be committed anew. The last one is committed along with the first step, as if it
        had just been made."""
        position, latents = self.recache_queue.pop(0)
        self.cache.seek(self.slot, position)
        self.inputs.x0[self.slot] = latents
        if not self.recache_queue:
            self.needs_recache, self.committed = False, False

    def _step_back(self) -> None:
        """Forget a commit that rode along with a chunk that was never accepted: a second try then does the same."""
        if self.commit_in_flight:
            self.cache.position[self.slot] -= self.config.chunk_frames
        self.commit_in_flight = False

    def on_forward_done(self, node: Forward, live: Sequence[int]) -> None:
        """A forward of the plan has succeeded."""
        if self.recache_queue:
            return self._replay()
        self.commit_in_flight = self.commit_in_flight or node.commit
        for slot in live:
            self.counts[slot] += node.step

    def poll_stop_flags(self, live: Sequence[int], state: Sequence[Sequence[float]] | None = None) -> list[bool]:
        """Which of the slots are done with their chunk: what the stop flags or, where a device cannot, policies say.

        state: `ModelRunner.read_state` after the forward, where somebody has read it already. A policy that judges how
        far an estimate has moved costs one read more.
        """
        state = self.inputs.read_state() if state is None else state
        if not self.host_decides:
            return [state[slot][-1] > 0 for slot in live]
        rows, limit = [self.slots.index(slot) for slot in live], len(self.schedule)
        policies, x0 = [self.policies[row] for row in rows], self.inputs.x0[self.slot]
        judged = [policy.signal if policy.signal == "change" else None for policy in policies]  # the rest is in `state`
        before = None if self.previous_x0 is None else _picked(self.previous_x0, rows)
        moved = read_policy_signals(judged, None, _picked(x0, rows), before)
        self.previous_x0 = x0
        values = [state[slot][:-1] if p.signal == "confidence" else m for slot, p, m in zip(live, policies, moved)]
        return [
            state[slot][-1] > 0
            if policy.rule(self.index, limit)
            else policy.should_stop(self.index, self.counts[slot], value, limit)
            for slot, policy, value in zip(live, policies, values)
        ]

    def result(self) -> Denoised:
        """What the plan has made."""
        state = self.inputs.state[self.slot, :-1].clone() if self.head else None
        return Denoised(self.inputs.x0[self.slot].clone(), list(self.counts.values()), state)

    def accept(self, latents: Tensor) -> None:
        """Move on to the next chunk."""
        self.commit_in_flight = False
        self._remember(latents)
        self.index, self.committed = self.index + 1, False

    def _remember(self, latents: Tensor) -> None:
        """Append to the past. Kept of it: the chunks that hold the sink and those that fill the ring."""
        self.past.append((self.position, latents))
        self.position += latents.shape[1]
        ring = [i for i, (first, _) in enumerate(self.past) if first >= self.cache.sink]
        if sum(self.past[i][1].shape[1] for i in ring[1:]) >= self.cache.window - self.cache.sink:
            del self.past[ring[0]]

    def set_prompt(self, text_kv: TextKV, recache: bool = True) -> None:
        """Go on under another prompt. With `recache` the past's keys and values are made anew under it."""
        if not recache:
            self.flush_cache()  # what was made under the old prompt is committed under it
        self.text_kv = text_kv
        self.needs_recache = self.needs_recache or (recache and bool(self.past))

    @on_device
    @torch.inference_mode()
    def flush_cache(self) -> None:
        """Bring the cache up to date: commit what is not committed, or replay the whole window after a switch."""
        self._step_back()
        if self.needs_recache:
            self.cache.clear(self.slot)
            for position, latents in self.past:
                self.cache.seek(self.slot, position)
                self._commit(latents, "clean")
        elif not self.committed:
            self._commit(self.past[-1][1], self.config.commit)
        self.needs_recache, self.committed = False, True

    def _commit(self, latents: Tensor, mode: str) -> None:
        frames = latents.shape[1]
        if mode == "clean":  # "exit_step" keeps what the last denoising step has written
            commit_chunk(self.dit, latents, self.text_kv, self.cache.rows(self.slot, frames))
        self.cache.advance(self.slot, frames)

    def save(self) -> dict[str, Any]:
        """A copy of the whole state; `load` brings it back, here or in a rollout made alike."""
        self._step_back()
        return {
            "cache": self.cache.save(self.slot),
            "policies": copy.deepcopy(self.policies),
            "past": list(self.past),
            **{name: getattr(self, name) for name in _PLAIN_STATE},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.cache.load(self.slot, state["cache"])
        self.policies = copy.deepcopy(state["policies"])
        self.past, self.commit_in_flight = list(state["past"]), False
        for name in _PLAIN_STATE:
            setattr(self, name, state[name])

    def restart(self) -> None:
        """Back to the first chunk, under the prompt in force."""
        self.cache.clear(self.slot)
        self.policies = copy.deepcopy(self.initial_policies)
        self._begin()

    def close(self) -> None:
        """Give the cache slots back. Harmless when done twice."""
        if self.slot is not None:
            self.cache.release(self.slot)
            self.slot, self.past = None, []


def _picked(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows], for which a list of numbers would have to be sent to the device."""
    return x if len(rows) == len(x) else torch.stack([x[row] for row in rows])


# Replaced, never written to: no copy needed.
_PLAIN_STATE = ("text_kv", "noise", "given", "index", "position", "committed", "needs_recache")
