"""A rollout: B clips that advance chunk by chunk in lockstep on the KV cache. Latents only; `Session` adds pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dsa_engine.config import RolloutConfig
from dsa_engine.engine.chunk_plan import Forward, LaunchSpec, chunk_plan, run_plan
from dsa_engine.engine.device import Moment, on_device, read
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.interfaces import TextKV
from dsa_engine.sampling.denoise import Denoised, Step, commit_chunk, denoise_chunk, read_policy_signals
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.sampling.noise import Noise
from dsa_engine.sampling.policy import ExitRule, Policy, Relative
from dsa_engine.sampling.schedule import Schedule


class CacheState(Enum):
    """How a rollout's KV cache relates to its past chunks."""

    COMMITTED = "committed"  # it holds all of them, under the prompt in force
    UNCOMMITTED = "uncommitted"  # all but the last
    COMMITTING = "committing"  # the last was committed by a forward of the next chunk, which is not accepted yet
    STALE = "stale"  # it was filled under an earlier prompt, or never: all are to be committed again
    RECACHING = "recaching"  # the next chunk's first forwards do so


TRANSITIONS = {
    CacheState.COMMITTED: {CacheState.UNCOMMITTED, CacheState.STALE},
    CacheState.UNCOMMITTED: {CacheState.COMMITTED, CacheState.COMMITTING, CacheState.STALE},
    CacheState.COMMITTING: {CacheState.UNCOMMITTED, CacheState.STALE},
    CacheState.STALE: {CacheState.RECACHING, CacheState.COMMITTED},
    CacheState.RECACHING: {CacheState.UNCOMMITTED, CacheState.STALE},
}


class Rollout:
    """Owns everything a clip's latents depend on: cache slots, prompt keys and values, noise, policies, position.

    A chunk is committed (its clean keys and values written) only when the next one is requested: the first frames leave
    earlier, and the last chunk of a clip is never committed. State changes only after the forward that it belongs to
    has succeeded, and a forward writes only frames that are evicted anyway, so a failed step can be retried with the
    same result.
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
        """Acquire cache slots for one row per policy.

        Args:
            given: clean latents [B, G, C, H, W] that the clip begins with.
            strength: of the Schedule.
            inputs: runner of the cache's slots, whose plans commit along with a chunk's first step; None: the plain
                loop (`denoise_chunk`), which calls any dit and head.
        """
        self.dit, self.head, self.cache, self.config, self.noise = dit, head, cache, config, noise
        self.schedule = Schedule(config.steps, config.shift, strength)
        self.given, self.text_kv, self.inputs = given, text_kv, inputs
        self.initial_policies = [policy.start(len(self.schedule)) for policy in policies]
        self.slot: Tensor | None = cache.acquire(len(policies))
        self.slots: list[int] = self.slot.tolist()
        self._start()

    def _start(self) -> None:
        """Before the first chunk."""
        self.policies = copy.deepcopy(self.initial_policies)
        self.index = 0  # of the next chunk to be generated
        self.position = 0  # of its first frame
        self.past: list[tuple[int, Tensor]] = []  # (first frame, latents) of the chunks that a recache replays
        # [B, F] of the last accepted chunk, what `Relative` compares the next one with; 1 before the first.
        self.exit_confidence = torch.ones(len(self.slots), self.config.chunk_frames, device=self.device)
        if self.given is not None:
            size = self.config.chunk_frames
            short = self.given.shape[1] % size  # an image is one frame: a partial chunk comes first
            for latents in self.given.split([short] * bool(short) + [size] * (self.given.shape[1] // size), dim=1):
                self._remember(latents)
        self.state = CacheState.STALE if self.past else CacheState.COMMITTED
        self.loaded_text_kv: TextKV | None = None  # the prompt that the inputs hold
        self.recache_queue: list[tuple[int, Tensor]] = []  # of the past, what the chunk's forwards have yet to recommit
        # The last chunk's commit from start to end, where it took forwards of its own.
        self.commit_span: tuple[Moment, Moment] | None = None
        # Of the chunk in the making: steps by slot, its previous estimate, whether a policy needs the host to decide.
        self.steps: dict[int, int] = {}
        self.previous_x0: Tensor | None = None
        self.host_decides = False

    @property
    def device(self) -> torch.device:
        return self.cache.k.device

    def _enter(self, state: CacheState) -> None:
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"the cache is {self.state.value} and cannot become {state.value}")
        self.state = state

    # ---- a chunk -----------------------------------------------------------------------------------------------------

    @on_device
    @torch.inference_mode()
    def denoise(self, on_step: Callable[[Step], None] | None = None) -> Denoised:
        """Commit the previous chunk and denoise the next one. It counts only once it is passed to `accept`.

        on_step: called after each step, before it is decided who goes on; then each step is a launch of its own.
        """
        if self.inputs is None:
            return self._denoise_plain(on_step)
        launches = self.inputs.lower(self.prepare_chunk(), len(self.slots), self.host_decides, on_step is not None)
        x = None

        def done(forward: Forward, live: Sequence[int]) -> None:
            self.on_forward_done(forward, live)
            if on_step is not None and forward.step:
                on_step(self._step(x, live))

        for launch, live in self.run(launches, done):
            x = None if on_step is None else self.inputs.x[live]
            self.inputs.launch(launch, live)
        return self.result()

    def _denoise_plain(self, on_step: Callable[[Step], None] | None) -> Denoised:
        self._flush_timed()
        if any(isinstance(policy, Relative) for policy in self.policies):  # here the host decides
            for policy, confidence in zip(self.policies, read(self.exit_confidence).tolist()):
                if isinstance(policy, Relative):
                    policy.follow(confidence)
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

    def _step(self, x: Tensor, live: Sequence[int]) -> Step:
        """The step that the slots have just taken from x."""
        inputs, index, rows = self.inputs, self.steps[live[0]], [self.slots.index(slot) for slot in live]
        confidence = inputs.state[live, :-1] if self.head else None
        return Step(self.index, index, self.schedule.sigmas[index - 1], rows, x, inputs.x0[live], confidence)

    @on_device
    @torch.inference_mode()
    def prepare_chunk(self) -> tuple[Forward, ...]:
        """Write the next chunk's inputs; returns its plan, for `run`."""
        inputs, size = self.inputs, self.config.chunk_frames
        self._roll_back()
        # A moving sink is rotated for one chunk at a time, and the ring needs headroom for what the previous one sees.
        headroom = self.config.window is None or self.cache.headroom >= size
        merge = headroom and self.cache.unrotated_sink is None and self.config.commit == "clean"
        whole = all(latents.shape[1] == size for _, latents in self.past)  # not so after an image
        self.recache_queue, self.commit_span = [], None
        if merge and self.state is CacheState.UNCOMMITTED:
            inputs.x0[self.slot] = self.past[-1][1]
        elif merge and whole and self.state is CacheState.STALE:
            self.cache.clear(self.slot)
            self.recache_queue = list(self.past)
            self._enter(CacheState.RECACHING)
            self._recache_next()
        else:
            self._flush_timed()
        if self.text_kv is not self.loaded_text_kv:
            inputs.set_prompt(self.slot, self.text_kv)
            self.loaded_text_kv = self.text_kv
        limit = len(self.schedule)
        rules = [policy.rule(self.index, limit) for policy in self.policies]
        self.host_decides = None in rules
        rules = [rule or ExitRule(1, limit) for rule in rules]
        max_steps = max(rule.max_steps for rule in rules)
        noise = self.noise.draw_chunk(self.index, max_steps)
        inputs.start_chunk(self.slot, noise, self.schedule.sigmas, rules, self.exit_confidence)
        self.steps, self.previous_x0 = dict.fromkeys(self.slots, 0), None
        commit = self.state is not CacheState.COMMITTED
        return chunk_plan(min(rule.min_steps for rule in rules), max_steps, commit, len(self.recache_queue))

    def run(
        self, launches: Sequence[LaunchSpec], on_forward_done: Callable[[Forward, Sequence[int]], None] | None = None
    ) -> Generator[tuple[LaunchSpec, list[int]], list | None, None]:
        """The launches of the prepared chunk with the slots that take part (`run_plan`); the caller runs each."""
        done = on_forward_done or self.on_forward_done
        return run_plan(launches, self.slots, done, self.poll_stop_flags, self.inputs.steps_taken)

    def on_forward_done(self, forward: Forward, live: Sequence[int]) -> None:
        """A forward of the plan has succeeded."""
        if self.recache_queue:
            return self._recache_next()
        if forward.commit and self.state is CacheState.UNCOMMITTED:
            self._enter(CacheState.COMMITTING)
        for slot in live:
            self.steps[slot] += forward.step

    def _recache_next(self) -> None:
        """Make the queue's next chunk the one to commit. The last is committed along with the first step, like a
        chunk that was just generated."""
        position, latents = self.recache_queue.pop(0)
        self.cache.seek(self.slot, position)
        self.inputs.x0[self.slot] = latents
        if not self.recache_queue and self.state is CacheState.RECACHING:
            self._enter(CacheState.UNCOMMITTED)

    def poll_stop_flags(self, live: Sequence[int], state: Sequence[Sequence[float]] | None = None) -> list[bool]:
        """Which of the slots are done with their chunk, by the stop flags or, where the host decides, by the policies.

        state: `ModelRunner.read_state` after the forward, if the caller has read it. A policy on the estimate's change
        costs one more read.
        """
        state = self.inputs.read_state() if state is None else state
        if not self.host_decides:
            return [state[slot][-1] > 0 for slot in live]
        rows, limit = [self.slots.index(slot) for slot in live], len(self.schedule)
        policies, x0 = [self.policies[row] for row in rows], self.inputs.x0[self.slot]
        signals = [
            policy.signal if policy.signal == "change" else None for policy in policies
        ]  # the rest is in `state`
        previous = None if self.previous_x0 is None else _select(self.previous_x0, rows)
        changes = read_policy_signals(signals, None, _select(x0, rows), previous)
        self.previous_x0 = x0
        values = [
            state[slot][:-1] if policy.signal == "confidence" else change
            for slot, policy, change in zip(live, policies, changes)
        ]
        return [
            state[slot][-1] > 0
            if policy.rule(self.index, limit)
            else policy.should_stop(self.index, self.steps[slot], value, limit)
            for slot, policy, value in zip(live, policies, values)
        ]

    def result(self) -> Denoised:
        """What the plan has generated."""
        confidence = self.inputs.state[self.slot, :-1] if self.head else None
        return Denoised(self.inputs.x0[self.slot], list(self.steps.values()), confidence)

    def accept(self, latents: Tensor, confidence: Tensor | None = None) -> None:
        """Move on to the next chunk.

        Args:
            latents: of the chunk that was denoised, [B, F, C, H, W].
            confidence: of its exit step, float32 [B, F]; None without a head.

        Raises:
            ValueError: no confidence, but a `Relative` policy, which compares the next chunk with it.
        """
        if confidence is not None:
            self.exit_confidence = confidence
        elif any(isinstance(policy, Relative) for policy in self.policies):
            raise ValueError("confidence=None: Relative compares the next chunk with it; give that of the exit step")
        if self.state is not CacheState.STALE:
            self._enter(CacheState.UNCOMMITTED)
        self._remember(latents)
        self.index += 1

    def _remember(self, latents: Tensor) -> None:
        """Append to the past, and drop from it what neither the sink nor the ring holds any more."""
        self.past.append((self.position, latents))
        self.position += latents.shape[1]
        ring = [i for i, (first, _) in enumerate(self.past) if first >= self.cache.sink]
        if sum(self.past[i][1].shape[1] for i in ring[1:]) >= self.cache.window - self.cache.sink:
            del self.past[ring[0]]

    # ---- the cache ---------------------------------------------------------------------------------------------------

    def set_prompt(self, text_kv: TextKV, recache: bool = True, switched: bool | Sequence[bool] = True) -> None:
        """Go on under another prompt.

        Args:
            text_kv: the prompt's keys and values.
            recache: recompute the past's keys and values under it.
            switched: whether the next chunk is the first under it, of each row or of all: not so where another chunk
                of a transition was. `Relative.on_prompt_switch` follows it.
        """
        if not recache:
            self.flush_cache()  # what was generated under the old prompt is committed under it
        self.text_kv = text_kv
        if recache and self.past:
            self._enter(CacheState.STALE)
        resets = [isinstance(p, Relative) and p.on_prompt_switch == "reset" for p in self.policies]
        if any(resets):
            rows = [switched] * len(resets) if isinstance(switched, bool) else switched
            self.exit_confidence = torch.stack(
                [torch.ones_like(c) if a and b else c for c, a, b in zip(self.exit_confidence, resets, rows)]
            )

    @on_device
    @torch.inference_mode()
    def flush_cache(self) -> None:
        """Bring the cache up to date at once: commit the last chunk, or the whole past after a prompt change."""
        self._roll_back()
        if self.state is CacheState.STALE:
            self.cache.clear(self.slot)
            for position, latents in self.past:
                self.cache.seek(self.slot, position)
                self._commit(latents, "clean")
        elif self.state is CacheState.UNCOMMITTED:
            self._commit(self.past[-1][1], self.config.commit)
        self._enter(CacheState.COMMITTED)

    def _flush_timed(self) -> None:
        start = Moment(self.device)
        self.flush_cache()
        self.commit_span = start, Moment(self.device)

    def _commit(self, latents: Tensor, mode: str) -> None:
        frames = latents.shape[1]
        if mode == "clean":  # "exit_step" keeps what the last denoising step has written
            commit_chunk(self.dit, latents, self.text_kv, self.cache.rows(self.slot, frames))
        self.cache.advance(self.slot, frames)

    def _roll_back(self) -> None:
        """Undo the commits of a chunk that was never accepted, so that another try does the same."""
        if self.state is CacheState.COMMITTING:
            self.cache.position[self.slot] -= self.config.chunk_frames
            self._enter(CacheState.UNCOMMITTED)
        elif self.state is CacheState.RECACHING:
            self._enter(CacheState.STALE)

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """A copy of the whole state; `load` restores it, here or in an equal rollout."""
        self._roll_back()
        return {
            "cache": self.cache.save(self.slot),
            "policies": copy.deepcopy(self.policies),
            "past": list(self.past),
            **{name: getattr(self, name) for name in _PLAIN_STATE},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.cache.load(self.slot, state["cache"])
        self.policies = copy.deepcopy(state["policies"])
        self.past = list(state["past"])
        for name in _PLAIN_STATE:
            setattr(self, name, state[name])

    def restart(self) -> None:
        """Back to the first chunk, under the prompt in force."""
        self.cache.clear(self.slot)
        self._start()

    def close(self) -> None:
        """Release the cache slots. Idempotent."""
        if self.slot is not None:
            self.cache.release(self.slot)
            self.slot, self.past = None, []


def _select(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows] without sending a list of indices to the device."""
    return x if len(rows) == len(x) else torch.stack([x[row] for row in rows])


# Replaced, never written to: no copy needed.
_PLAIN_STATE = ("text_kv", "noise", "given", "index", "position", "state", "exit_confidence")
